{{- define "heterorl.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- /* Name of what lies in the release's namespace. */ -}}
{{- define "heterorl.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains $name .Release.Name -}}
{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- /* Name of what lies outside of it, where releases of other namespaces may be of the same name. */ -}}
{{- define "heterorl.scopedName" -}}
{{ include "heterorl.fullname" . }}-{{ .Release.Namespace }}
{{- end }}

{{- define "heterorl.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "heterorl.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ required "serviceAccount.name is empty; name an account that exists, or set serviceAccount.create=true" .Values.serviceAccount.name }}
{{- end -}}
{{- end }}

{{- define "heterorl.priorityClassName" -}}
{{- if .Values.priorityClass.create -}}
{{ default (include "heterorl.scopedName" .) .Values.priorityClassName }}
{{- else -}}
{{ .Values.priorityClassName }}
{{- end -}}
{{- end }}

{{- /* Labels of every object. */ -}}
{{- define "heterorl.labels" -}}
{{ include "heterorl.selector" . }}
app.kubernetes.io/part-of: heterorl
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- /* Labels by which the operator's pod is found. The component tells it from the pods of a run of the release's name. */ -}}
{{- define "heterorl.selector" -}}
app.kubernetes.io/name: {{ include "heterorl.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- /* An image's full name: dict "root" $ "image" .Values.image */ -}}
{{- define "heterorl.image" -}}
{{- with .root.Values.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- .image.repository -}}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ default .root.Chart.AppVersion .image.tag }}{{ end -}}
{{- end }}

{{- /* Where and as whom the operator's pod and the test's run. */ -}}
{{- define "heterorl.scheduling" -}}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "heterorl.priorityClassName" . }}
priorityClassName: {{ . }}
{{- end }}
{{- if .Values.hostNetwork }}
hostNetwork: true
{{- end }}
{{- with default (ternary "ClusterFirstWithHostNet" "" .Values.hostNetwork) .Values.dnsPolicy }}
dnsPolicy: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
