{{- /*
What the templates need to know of one pool, as YAML: the pool's values over its stage's defaults, and what follows from
them. dict root, model, stage.
*/ -}}
{{- define "emu2.pool" -}}
{{- $root := .root -}}
{{- $pool := mustMergeOverwrite (deepCopy (get $root.Values.stages .stage)) (deepCopy (get .model .stage)) -}}
{{- $what := printf "models: %s.%s" .model.name .stage -}}
{{- $name := printf "%s-%s-%s" (include "emu2.fullname" $root) .model.name .stage -}}
{{- /* 63 for a label, less the 11 that the controller appends to it for a revision. */ -}}
{{- if gt (len $name) 52 -}}
{{- fail (printf "%s: the name %q has %d characters, at most 52 fit; shorten the model's name or set fullnameOverride" $what $name (len $name)) -}}
{{- end -}}
{{- $port := get (dict "encoder" 50052 "llm" 50053 "decoder" 50054) .stage -}}
{{- $image := mustMergeOverwrite (deepCopy $root.Values.image.stages) $pool.image -}}
{{- $devices := include "emu2.devices" (dict "pool" $pool "what" $what) | fromJsonArray -}}
{{- $server := dict
      "listen" (include "emu2.listen" (dict "root" $root "port" $port))
      "admin" (include "emu2.listen" (dict "root" $root "port" (add $port 1000)))
      "tls" (include "emu2.server.tls" (dict "mode" $root.Values.tls.stages.mode "folder" "/run/secrets/emu2-tls") | fromYaml) -}}
{{- $own := dict
      "model_dir" (include "emu2.modelDir" .model)
      "devices" $devices
      "cores" (include "emu2.cores" $pool | int)
      "server" $server -}}
{{- $config := mustMergeOverwrite (deepCopy $root.Values.config) (deepCopy $pool.config) $own -}}
{{- $derived := dict
      "name" $name
      "port" $port
      "adminPort" (add $port 1000)
      "imageName" (include "emu2.image" (dict "root" $root "image" $image))
      "resources" (include "emu2.resources" (dict "pool" $pool "what" $what) | fromYaml)
      "toml" (include "emu2.toml" (dict "path" "" "table" $config) | trim)
      "graceSeconds" (include "emu2.graceSeconds" $config | int) -}}
{{- toYaml (mustMergeOverwrite $pool $derived) -}}
{{- end -}}

{{- /* dict pool, what: JSON list of torch devices */ -}}
{{- define "emu2.devices" -}}
{{- $gpus := int .pool.gpus -}}
{{- $devices := .pool.devices -}}
{{- if not $devices -}}
{{- range $gpu := until $gpus -}}
{{- $devices = append $devices (printf "cuda:%d" $gpu) -}}
{{- end -}}
{{- $devices = default (list "cpu") $devices -}}
{{- end -}}
{{- range $devices -}}
{{- if and (hasPrefix "cuda:" .) (ge (trimPrefix "cuda:" . | int) $gpus) -}}
{{- fail (printf "%s: devices names %s, but gpus is %d" $.what . $gpus) -}}
{{- end -}}
{{- end -}}
{{- toJson $devices -}}
{{- end -}}

{{- /* dict pool, what: resources with the GPUs, which Kubernetes takes as a limit only */ -}}
{{- define "emu2.resources" -}}
{{- $resources := .pool.resources -}}
{{- range $kind := list "requests" "limits" -}}
{{- if hasKey (default dict (get $resources $kind)) "nvidia.com/gpu" -}}
{{- fail (printf "%s: give GPUs as `gpus`, not in resources: the devices follow from it" $.what) -}}
{{- end -}}
{{- end -}}
{{- if int .pool.gpus -}}
{{- $resources = mustMergeOverwrite (deepCopy $resources) (dict "limits" (dict "nvidia.com/gpu" (toString .pool.gpus))) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- /* A pool's threads: its own word, else its CPU limit or request rounded up, else 0, all cores. */ -}}
{{- define "emu2.cores" -}}
{{- if hasKey . "cores" -}}
{{- .cores -}}
{{- else -}}
{{- $limits := default dict .resources.limits -}}
{{- $requests := default dict .resources.requests -}}
{{- $cpu := get $limits "cpu" | default (get $requests "cpu") | default 0 | toString -}}
{{- if hasSuffix "m" $cpu -}}
{{- div (add (trimSuffix "m" $cpu | int) 999) 1000 -}}
{{- else -}}
{{- ceil (float64 $cpu) | int -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /*
A service's termination grace period from its configuration: its shutdown grace, and 10 s for what comes after (a second
each for the last trailers and the admin port, five for the engine to end its step).
*/ -}}
{{- define "emu2.graceSeconds" -}}
{{- $server := default dict .server -}}
{{- $graceMs := hasKey $server "shutdown_grace_ms" | ternary (get $server "shutdown_grace_ms") 30000 -}}
{{- add (ceil (divf $graceMs 1000) | int) 10 -}}
{{- end -}}

{{- /*
The router's endpoint of one pool. dict pool, scheme. A headless Service's name stands for all its pods, and the router asks for
it again and again: replicas come and go, by hand or by an autoscaler, without a word to the routers. Within the
namespace, so the cluster's domain need not be known.
*/ -}}
{{- define "emu2.endpoints" -}}
{{- toJson (list (printf "dns+%s://%s:%d" .scheme .pool.name (int .pool.port))) -}}
{{- end -}}
