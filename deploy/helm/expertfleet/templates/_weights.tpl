{{/* Weights: in the image, on a claim, in an image volume, or fetched before the process starts */}}

{{- define "expertfleet.weightMounts" -}}
{{- $weights := .Values.weights -}}
{{- if ne $weights.source "bundled" }}
- name: weights
  mountPath: {{ $weights.mountPath }}
  readOnly: {{ ne $weights.source "download" }}
{{- end }}
{{- end }}

{{- define "expertfleet.weightVolumes" -}}
{{- $weights := .Values.weights -}}
{{- if eq $weights.source "pvc" }}
- name: weights
  persistentVolumeClaim:
    claimName: {{ $weights.pvcClaim }}
    readOnly: true
{{- else if eq $weights.source "image" }}
- name: weights
  image:
    reference: {{ $weights.image }}
    pullPolicy: IfNotPresent
{{- else if eq $weights.source "download" }}
- name: weights
  emptyDir:
    sizeLimit: {{ $weights.downloadSize }}
{{- end }}
{{- end }}

{{/* Of the fetching container and of the process, which may load further experts later */}}
{{- define "expertfleet.weightEnv" -}}
{{- $weights := .Values.weights -}}
{{- if eq $weights.source "download" }}
- name: HF_HOME
  value: {{ $weights.mountPath }}
{{- with $weights.hubEndpoint }}
- name: HF_ENDPOINT
  value: {{ . }}
{{- end }}
{{- with $weights.hubTokenSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: token
{{- end }}
{{- end }}
{{- end }}

{{/* (context, image, arguments that say what is needed) */}}
{{- define "expertfleet.fetch" -}}
{{- $root := index . 0 -}}
{{- if eq $root.Values.weights.source "download" }}
initContainers:
  - name: fetch-weights
    image: {{ index . 1 }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    command: [python, -m, services.core.checkpoints.fetch]
    args:
      {{- toYaml (index . 2) | nindent 6 }}
    envFrom:
      {{- include "expertfleet.envFrom" $root | nindent 6 }}
    env:
      {{- include "expertfleet.weightEnv" $root | trim | nindent 6 }}
    securityContext:
      {{- include "expertfleet.containerSecurity" $root | nindent 6 }}
    resources:
      {{- include "expertfleet.resources" (list "500m" "2Gi" 0) | nindent 6 }}
    volumeMounts:
      - name: tmp
        mountPath: /tmp
      {{- include "expertfleet.weightMounts" $root | trim | nindent 6 }}
{{- end }}
{{- end }}
