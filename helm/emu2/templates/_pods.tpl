{{- /* What every pod of the chart has in common: no rights, and nothing that it does not need. */ -}}

{{- /* dict root, user */ -}}
{{- define "emu2.pod.security" -}}
# No service talks to the API server.
automountServiceAccountToken: false
# Variables that tell of Services only crowd the environment, and one named EMU2__… would be refused as a setting.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .user }}
  runAsGroup: {{ .user }}
  # No fsGroup: kubelet would walk, and try to change, a volume of a hundred gigabytes that is read-only here.
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "emu2.container.security" -}}
securityContext:
  allowPrivilegeEscalation: false
  privileged: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{- /* Asks whether a pod is ready. Both ports say the same; kubelet's gRPC probes cannot speak TLS. dict port, tlsMode */ -}}
{{- define "emu2.pod.ready" -}}
{{- if eq .tlsMode "none" -}}
grpc:
  port: {{ .port }}
{{- else -}}
httpGet:
  path: /readyz
  port: admin
{{- end -}}
{{- end -}}

{{- /* `server.tls` of a service whose Secret is mounted at `folder`. dict mode, folder: as YAML */ -}}
{{- define "emu2.server.tls" -}}
{{- $tls := dict "mode" .mode -}}
{{- if ne .mode "none" -}}
{{- $_ := set $tls "cert_file" (printf "%s/tls.crt" .folder) -}}
{{- $_ := set $tls "key_file" (printf "%s/tls.key" .folder) -}}
{{- end -}}
{{- if eq .mode "mutual" -}}
{{- $_ := set $tls "client_ca_file" (printf "%s/ca.crt" .folder) -}}
{{- end -}}
{{- toYaml $tls -}}
{{- end -}}

{{- /* Where a pod may run. The values of the router or of a pool. */ -}}
{{- define "emu2.pod.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- /* dict root, adminPort, checksums (of what is mounted or in the environment: pods roll with it), extra */ -}}
{{- define "emu2.pod.annotations" -}}
{{- range $name, $sum := .checksums }}
checksum/{{ $name }}: {{ $sum }}
{{- end }}
{{- if .root.Values.metrics.annotations }}
prometheus.io/scrape: "true"
prometheus.io/port: {{ .adminPort | quote }}
prometheus.io/path: /metrics
{{- end }}
{{- with .extra }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /*
Readiness is the gRPC health that clients see. Liveness asks the admin port whether the process answers at all: health
is NOT_SERVING while weights load and while a router waits for its stages, and killing a pod for that helps nobody.
dict port, tlsMode
*/ -}}
{{- define "emu2.pod.probes" -}}
readinessProbe:
  {{- include "emu2.pod.ready" . | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: 2
livenessProbe:
  httpGet:
    path: /healthz
    port: admin
  # A minute in all: a stage's threads share the pod's CPUs with a forward that may take seconds.
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}
