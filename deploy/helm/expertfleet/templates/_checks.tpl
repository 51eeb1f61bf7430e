{{/* What one value alone does not tell to be wrong; included once, by the settings' ConfigMap */}}
{{- define "expertfleet.checks" -}}
{{- $weights := .Values.weights -}}
{{- $isHubId := regexMatch "^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*$" .Values.model -}}
{{- if and (eq $weights.source "pvc") (not $weights.pvcClaim) -}}
{{- fail "weights.source pvc needs weights.pvcClaim, the name of a PersistentVolumeClaim with the weights" -}}
{{- end -}}
{{- if and (eq $weights.source "image") (not $weights.image) -}}
{{- fail "weights.source image needs weights.image, an OCI image with the weights" -}}
{{- end -}}
{{- if and (eq $weights.source "image") (semverCompare "<1.31.0-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "weights.source image needs Kubernetes 1.31 or newer, and this is %s" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if and (eq $weights.source "download") (not $isHubId) -}}
{{- fail (printf "weights.source download needs a hub id as model, such as mistralai/Mixtral-8x7B-v0.1; %s is none" .Values.model) -}}
{{- end -}}
{{- if and (has $weights.source (list "pvc" "image")) (ne .Values.model $weights.mountPath) (not (hasPrefix (printf "%s/" $weights.mountPath) .Values.model)) -}}
{{- fail (printf "model %s is not below weights.mountPath %s, where weights.source %s puts the weights" .Values.model $weights.mountPath $weights.source) -}}
{{- end -}}
{{- $redis := .Values.redis -}}
{{- if and (not $redis.bundled) (not $redis.host) -}}
{{- fail "redis.bundled false needs redis.host, the address of the external store" -}}
{{- end -}}
{{- if and $redis.caSecret (not $redis.tls) -}}
{{- fail "redis.caSecret is of use with redis.tls true alone" -}}
{{- end -}}
{{- if and $redis.clientCertSecret (not $redis.tls) -}}
{{- fail "redis.clientCertSecret is of use with redis.tls true alone" -}}
{{- end -}}
{{- if and (not $redis.bundled) $redis.password -}}
{{- fail "redis.password is the bundled store's; name a Secret in redis.passwordSecret for the external one" -}}
{{- end -}}
{{- if and .Values.tls.enabled (eq .Values.tls.source "secret") (not .Values.tls.secret) -}}
{{- fail "tls.source secret needs tls.secret, a Secret with tls.crt, tls.key and ca.crt" -}}
{{- end -}}
{{- if not .Values.autoscaler.enabled -}}
{{- range (include "expertfleet.groups" . | fromJson).groups -}}
{{- if eq .mode "builtin" -}}
{{- fail (printf "experts.groups: %s is to be scaled by the builtin autoscaler, but autoscaler.enabled is false; set autoscaling.mode" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $name, $_ := .Values.settings -}}
{{- if has $name (list "model" "served_model_name" "fleet" "log_level" "host" "port" "shard_host" "lane_port" "dispatch_lane" "kv_cache_bytes" "max_num_seqs" "shard_weights" "trace_sample_ratio" "otlp_endpoint" "tls_cert_file" "tls_key_file" "tls_ca_file" "redis_url" "api_keys" "admin_key" "device" "expert_weights" "shard_advertised_host" "metrics_host" "metrics_port" "worker_memory_bytes" "drain_timeout_s") -}}
{{- fail (printf "settings.%s: the chart sets this variable itself, from a value of its own" $name) -}}
{{- end -}}
{{- end -}}
{{- end }}
