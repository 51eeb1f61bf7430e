{{/* (context, group): the group with what it does not say taken from `experts`, as JSON */}}
{{- define "expertfleet.group" -}}
{{- $root := index . 0 -}}
{{- $group := omit (deepCopy $root.Values.experts) "groups" "numLayers" "numExperts" -}}
{{- range $key, $value := index . 1 -}}
{{- $_ := set $group $key $value -}}
{{- end -}}
{{- $_ := set $group "deployment" (printf "%s-experts-%s" (include "expertfleet.fullname" $root) $group.name) -}}
{{- $_ := set $group "layers" (default "" $group.layers) -}}
{{- $_ := set $group "mode" (default $root.Values.autoscaling.mode $group.autoscaling) -}}
{{- toJson $group -}}
{{- end }}

{{/* All groups, as {"groups": [...]} in JSON. Fails on what the schema cannot see */}}
{{- define "expertfleet.groups" -}}
{{- $root := . -}}
{{- $groups := list -}}
{{- $names := dict -}}
{{- $held := dict -}}
{{- $experts := .Values.experts -}}
{{- range .Values.experts.groups -}}
{{- $group := include "expertfleet.group" (list $root .) | fromJson -}}
{{- if hasKey $names $group.name -}}
{{- fail (printf "experts.groups: two groups are called %s" $group.name) -}}
{{- end -}}
{{- $_ := set $names $group.name true -}}
{{- if gt (len $group.deployment) 46 -}}
{{- fail (printf "experts.groups: the Deployment's name %s has more than 46 letters, beyond which pod names no longer tell it; shorten fullnameOverride or the group's name" $group.deployment) -}}
{{- end -}}
{{- if lt (int $group.maxReplicas) (int $group.replicas) -}}
{{- fail (printf "experts.groups: %s has maxReplicas %d below replicas %d" $group.name (int $group.maxReplicas) (int $group.replicas)) -}}
{{- end -}}
{{- $groups = append $groups $group -}}
{{- if and $experts.numLayers $experts.numExperts -}}
{{- $layers := default (printf "0-%d" (sub (int $experts.numLayers) 1)) $group.layers -}}
{{- range $layer := splitList "|" (include "expertfleet.indices" $layers) -}}
{{- if ge (int $layer) (int $experts.numLayers) -}}
{{- fail (printf "experts.groups: %s names layer %s of a model that has %d" $group.name $layer (int $experts.numLayers)) -}}
{{- end -}}
{{- range $expert := splitList "|" (include "expertfleet.indices" $group.experts) -}}
{{- if ge (int $expert) (int $experts.numExperts) -}}
{{- fail (printf "experts.groups: %s names expert %s of a model that has %d" $group.name $expert (int $experts.numExperts)) -}}
{{- end -}}
{{- $_ := set $held (printf "%s:%s" $layer $expert) true -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $layer := until (int $experts.numLayers) -}}
{{- range $expert := until (int $experts.numExperts) -}}
{{- if not (hasKey $held (printf "%d:%d" $layer $expert)) -}}
{{- fail (printf "experts.groups: no group holds expert %d in layer %d" $expert $layer) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson (dict "groups" $groups) -}}
{{- end }}

{{/* "0,2-4" as "0|2|3|4" */}}
{{- define "expertfleet.indices" -}}
{{- $all := list -}}
{{- range splitList "," . -}}
{{- $ends := splitList "-" . -}}
{{- range $index := untilStep (int (first $ends)) (add1 (int (last $ends)) | int) 1 -}}
{{- $all = append $all (toString $index) -}}
{{- end -}}
{{- end -}}
{{- join "|" $all -}}
{{- end }}

{{/* --group of the autoscaler, which scales the group's Deployment */}}
{{- define "expertfleet.groupArgument" -}}
{{ .deployment }}={{ .experts }}{{ with .layers }}@{{ . }}{{ end }}:{{ .replicas }}-{{ .maxReplicas }}
{{- end }}

{{/* Names of the Deployments that the autoscaler scales, as {"names": [...]} in JSON */}}
{{- define "expertfleet.scaled" -}}
{{- $names := list -}}
{{- if .Values.autoscaler.enabled -}}
{{- range (include "expertfleet.groups" . | fromJson).groups -}}
{{- if eq .mode "builtin" -}}
{{- $names = append $names .deployment -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson (dict "names" $names) -}}
{{- end }}
