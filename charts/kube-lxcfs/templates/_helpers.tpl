{{- define "kube-lxcfs.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" -}}
{{- end }}

{{- define "kube-lxcfs.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains (include "kube-lxcfs.name" .) .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "kube-lxcfs.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "kube-lxcfs.serviceAccount" -}}
{{- default (ternary (include "kube-lxcfs.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end }}

{{- /* What a DaemonSet selects by: (list . "agent") */ -}}
{{- define "kube-lxcfs.selector" -}}
app.kubernetes.io/name: {{ include "kube-lxcfs.name" (first .) }}
app.kubernetes.io/instance: {{ (first .).Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end }}

{{- /* The metadata of every object: (list . "agent" "-suffix") */ -}}
{{- define "kube-lxcfs.metadata" -}}
{{- $ := first . -}}
name: {{ include "kube-lxcfs.fullname" $ }}{{ index . 2 }}
{{- if ne (index . 3) "cluster" }}
namespace: {{ $.Release.Namespace }}
{{- end }}
labels:
  {{- include "kube-lxcfs.selector" (list $ (index . 1)) | nindent 2 }}
  app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ $.Release.Service }}
  helm.sh/chart: {{ printf "%s-%s" $.Chart.Name $.Chart.Version }}
  {{- with $.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "kube-lxcfs.annotations" -}}
{{- with .Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Where lxcfs is mounted, as the agent sees it. */ -}}
{{- define "kube-lxcfs.lxcfsPath" -}}
{{- if .Values.lxcfs.enabled -}}{{ .Values.hostPath }}/lxcfs{{- else -}}{{ .Values.lxcfs.hostManagedPath }}{{- end -}}
{{- end }}

{{- /* The pod's part that both DaemonSets share: (list . "agent") */ -}}
{{- define "kube-lxcfs.placement" -}}
{{- $ := first . -}}
{{- $values := index $.Values (last .) -}}
{{- with $.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
terminationGracePeriodSeconds: {{ $values.terminationGracePeriodSeconds }}
{{- end }}

{{- /* A DaemonSet's pod metadata: (list . "agent") */ -}}
{{- define "kube-lxcfs.podMetadata" -}}
{{- $ := first . -}}
{{- $values := index $.Values (last .) -}}
labels:
  {{- include "kube-lxcfs.selector" . | nindent 2 }}
  {{- with merge (dict) $values.podLabels $.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  kubectl.kubernetes.io/default-container: {{ last . }}
  {{- if and (eq (last .) "agent") (semverCompare "<1.30-0" $.Capabilities.KubeVersion.Version) }}
  container.apparmor.security.beta.kubernetes.io/agent: unconfined
  {{- end }}
  {{- with merge (dict) $values.podAnnotations $.Values.commonAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
