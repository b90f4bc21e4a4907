{{- define "hcodec.labels" -}}
app.kubernetes.io/part-of: hcodec
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Image of `worker` or `airflow`: list of root context and name. */}}
{{- define "hcodec.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.images (index . 1) -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default $root.Chart.AppVersion $image.tag }}
{{- end -}}
{{- end }}

{{/* Turn whole numbers below a map into integers, in place: helm reads all numbers as floats, and TOML keeps them. */}}
{{- define "hcodec.integers" -}}
{{- $map := . -}}
{{- range $key, $value := $map -}}
{{- if kindIs "map" $value -}}
{{- include "hcodec.integers" $value -}}
{{- else if and (kindIs "float64" $value) (eq (floor $value) $value) -}}
{{- $_ := set $map $key (int64 $value) -}}
{{- else if kindIs "slice" $value -}}
{{- $items := list -}}
{{- range $item := $value -}}
{{- if kindIs "map" $item -}}
{{- include "hcodec.integers" $item -}}
{{- $items = append $items $item -}}
{{- else if and (kindIs "float64" $item) (eq (floor $item) $item) -}}
{{- $items = append $items (int64 $item) -}}
{{- else -}}
{{- $items = append $items $item -}}
{{- end -}}
{{- end -}}
{{- $_ := set $map $key $items -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* hcodec.toml */}}
{{- define "hcodec.config" -}}
{{- $access := .Values.config.access -}}
{{- $hint := "name the buckets: config.access.source_prefixes, config.access.destination_prefixes, config.catalog.uri, config.catalog.warehouse_uri and config.work.work_uri are required" -}}
{{- $_ := required $hint (and $access.source_prefixes $access.destination_prefixes .Values.config.catalog.uri .Values.config.catalog.warehouse_uri .Values.config.work.work_uri) -}}
{{- $config := deepCopy .Values.config -}}
{{- include "hcodec.integers" $config -}}
{{- $_ := set $config "format_version" 1 -}}
{{- toToml $config -}}
{{- end }}

{{/* kubernetes.toml: profiles with what follows from the rest of the values. */}}
{{- define "hcodec.kubernetes" -}}
{{- $root := . -}}
{{- $file := deepCopy .Values.kubernetes -}}
{{- $_ := set $file "format_version" 1 -}}
{{- $_ := set $file "namespace" .Values.namespace.name -}}
{{- range $name, $profile := $file.profiles -}}
{{- $defaults := dict
      "image" (include "hcodec.image" (list $root "worker"))
      "image_pull_policy" $root.Values.images.worker.pullPolicy
      "service_account" $root.Values.serviceAccounts.worker.name -}}
{{- if $root.Values.images.pullSecrets -}}
{{- $_ := set $defaults "image_pull_secrets" $root.Values.images.pullSecrets -}}
{{- end -}}
{{- if $root.Values.priorityClasses.create -}}
{{- $_ := set $defaults "priority_class" $root.Values.priorityClasses.batch.name -}}
{{- end -}}
{{- if $root.Values.kueue.enabled -}}
{{- $_ := set $defaults "kueue_queue" $root.Values.kueue.localQueue -}}
{{- end -}}
{{- range $key, $value := $defaults -}}
{{- if not (hasKey $profile $key) -}}
{{- $_ := set $profile $key $value -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- include "hcodec.integers" $file -}}
{{- toToml $file -}}
{{- end }}

{{/* Security of the chart's own pods; those of workers are made by the operator. */}}
{{- define "hcodec.podSecurity" -}}
runAsNonRoot: true
runAsUser: 50000
runAsGroup: 0
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "hcodec.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "hcodec.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}
