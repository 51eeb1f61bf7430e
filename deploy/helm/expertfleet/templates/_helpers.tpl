{{- define "expertfleet.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 30 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "expertfleet.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "expertfleet.labels" -}}
{{ include "expertfleet.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* (context, component): labels of a pod, and of what selects it */}}
{{- define "expertfleet.component" -}}
{{ include "expertfleet.selector" (index . 0) }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* (context, repository, GPUs) */}}
{{- define "expertfleet.image" -}}
{{- $root := index . 0 -}}
{{- $image := $root.Values.image -}}
{{- with $image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ index . 1 }}:{{ default $root.Chart.AppVersion $image.tag }}{{ if gt (int (index . 2)) 0 }}{{ $image.cudaTagSuffix }}{{ end }}
{{- end }}

{{- define "expertfleet.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Pod and container security: the "restricted" standard, and no writable root */}}
{{- define "expertfleet.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.runAsUser }}
runAsGroup: {{ .Values.podSecurity.runAsGroup }}
fsGroup: {{ .Values.podSecurity.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "expertfleet.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* (cpu, memory, GPUs): memory is a limit too, CPU is not */}}
{{- define "expertfleet.resources" -}}
requests:
  cpu: {{ index . 0 | quote }}
  memory: {{ index . 1 }}
limits:
  memory: {{ index . 1 }}
  {{- if gt (int (index . 2)) 0 }}
  nvidia.com/gpu: {{ index . 2 | int }}
  {{- end }}
{{- end }}

{{/* What every process of ours reads: the settings, the store, certificates */}}
{{- define "expertfleet.envFrom" -}}
- configMapRef:
    name: {{ include "expertfleet.fullname" . }}-settings
{{- end }}

{{- define "expertfleet.env" -}}
- name: HOME
  value: /tmp
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{- $redis := .Values.redis }}
{{- if or $redis.bundled $redis.passwordSecret }}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ $redis.bundled | ternary (printf "%s-redis" (include "expertfleet.fullname" .)) $redis.passwordSecret }}
      key: password
{{- end }}
- name: EXPERTFLEET_REDIS_URL
  value: {{ include "expertfleet.redisUrl" . }}
{{- end }}

{{/* Read by gRPC and the C library as they are loaded; the launcher sets the same for its children */}}
{{- define "expertfleet.nativeEnv" -}}
- name: GRPC_EXPERIMENTS
  value: "-event_engine_client,-event_engine_listener"
- name: MALLOC_MMAP_THRESHOLD_
  value: "1073741824"
- name: MALLOC_TRIM_THRESHOLD_
  value: "2147483648"
- name: MALLOC_TOP_PAD_
  value: "67108864"
{{- end }}

{{- define "expertfleet.redisUrl" -}}
{{- $redis := .Values.redis -}}
{{- if $redis.bundled -}}
redis://:$(REDIS_PASSWORD)@{{ include "expertfleet.fullname" . }}-redis:6379/0
{{- else -}}
{{- $user := ternary (printf "%s:$(REDIS_PASSWORD)@" $redis.username) "" (ne $redis.passwordSecret "") -}}
{{ $redis.tls | ternary "rediss" "redis" }}://{{ $user }}{{ $redis.host }}:{{ $redis.port }}/{{ $redis.database }}
{{- $query := list -}}
{{- if $redis.caSecret }}{{ $query = append $query "ssl_ca_certs=/etc/expertfleet/redis/ca.crt" }}{{ end -}}
{{- if $redis.clientCertSecret }}{{ $query = concat $query (list "ssl_certfile=/etc/expertfleet/redis/tls.crt" "ssl_keyfile=/etc/expertfleet/redis/tls.key") }}{{ end -}}
{{- if $query }}?{{ join "&" $query }}{{ end }}
{{- end -}}
{{- end }}

{{- define "expertfleet.mounts" -}}
- name: tmp
  mountPath: /tmp
{{- if .Values.tls.enabled }}
- name: tls
  mountPath: /etc/expertfleet/tls
  readOnly: true
{{- end }}
{{- if and (not .Values.redis.bundled) (or .Values.redis.caSecret .Values.redis.clientCertSecret) }}
- name: redis-tls
  mountPath: /etc/expertfleet/redis
  readOnly: true
{{- end }}
{{- end }}

{{- define "expertfleet.volumes" -}}
- name: tmp
  emptyDir: {}
{{- if .Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ include "expertfleet.tlsSecret" . }}
    defaultMode: 0440
{{- end }}
{{- if and (not .Values.redis.bundled) (or .Values.redis.caSecret .Values.redis.clientCertSecret) }}
- name: redis-tls
  projected:
    defaultMode: 0440
    sources:
      {{- with .Values.redis.caSecret }}
      - secret:
          name: {{ . }}
          items: [{key: ca.crt, path: ca.crt}]
      {{- end }}
      {{- with .Values.redis.clientCertSecret }}
      - secret:
          name: {{ . }}
          items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}]
      {{- end }}
{{- end }}
{{- end }}

{{- define "expertfleet.tlsSecret" -}}
{{- if eq .Values.tls.source "secret" -}}
{{ .Values.tls.secret }}
{{- else -}}
{{ include "expertfleet.fullname" . }}-tls
{{- end -}}
{{- end }}

{{- define "expertfleet.scrapeAnnotations" -}}
{{- $root := index . 0 -}}
{{- if eq $root.Values.monitoring.mode "annotations" -}}
prometheus.io/scrape: "true"
prometheus.io/port: {{ index . 1 | quote }}
prometheus.io/path: /metrics
{{- end -}}
{{- end }}
