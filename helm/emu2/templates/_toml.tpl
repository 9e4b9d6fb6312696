{{- /*
TOML by hand: Helm reads every number as a float, and its own toToml would write 17179869184 as 1.7179869184e+10.
*/ -}}

{{- define "emu2.toml.value" -}}
{{- if kindIs "float64" . -}}
{{- eq . (floor .) | ternary (int64 . | toString) (toString .) -}}
{{- else if or (kindIs "string" .) (kindIs "slice" .) -}}
{{- /* JSON's strings and lists of strings are TOML's too. */ -}}
{{- toJson . -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{- /* dict path ("" at the root), table. A table's own keys come before its tables, which would swallow them. */ -}}
{{- define "emu2.toml" -}}
{{- $path := .path -}}
{{- range $key, $value := .table }}
{{- if not (or (kindIs "map" $value) (kindIs "invalid" $value)) }}
{{ $key }} = {{ include "emu2.toml.value" $value }}
{{- end }}
{{- end }}
{{- range $key, $value := .table }}
{{- if and (kindIs "map" $value) $value }}
{{- $inner := printf "%s.%s" $path $key | trimPrefix "." }}

[{{ $inner }}]
{{- include "emu2.toml" (dict "path" $inner "table" $value) }}
{{- end }}
{{- end }}
{{- end -}}
