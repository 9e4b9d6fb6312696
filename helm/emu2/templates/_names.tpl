{{- /* Names and labels. A name that does not fit is refused: a shortened one could be another release's. */ -}}

{{- define "emu2.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name -}}
{{- end -}}
{{- end -}}

{{- /* dict root, component (router, encoder, llm, decoder, redis), model (absent for router and redis) */ -}}
{{- define "emu2.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .model }}
emu2-model: {{ . | quote }}
{{- end }}
{{- end -}}

{{- /*
Of objects. Pods have the selector's alone: with the chart's version in them, every upgrade would reload all weights.
*/ -}}
{{- define "emu2.labels" -}}
{{ include "emu2.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- /* dict root, image */ -}}
{{- define "emu2.image" -}}
{{- printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}

{{- /* dict root, port: "0.0.0.0:50051" or "[::]:50051" */ -}}
{{- define "emu2.listen" -}}
{{- $host := .root.Values.bindAddress -}}
{{- printf "%s:%d" (contains ":" $host | ternary (printf "[%s]" $host) $host) (int .port) -}}
{{- end -}}

{{- /* Non-empty where anyone may call the routers: neither TLS nor tokens, so that no key is needed. */ -}}
{{- define "emu2.open" -}}
{{- if and (eq .Values.tls.clients.mode "none") (eq .Values.router.auth.mode "none") }}open{{ end -}}
{{- end -}}
