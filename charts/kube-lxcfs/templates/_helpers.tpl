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
{{- if .Values.serviceAccount.name -}}
{{- .Values.serviceAccount.name -}}
{{- else -}}
{{- ternary (include "kube-lxcfs.fullname" .) "default" .Values.serviceAccount.create -}}
{{- end -}}
{{- end }}

{{- /* A repository, in global.imageRegistry if that is set: (list . REPOSITORY). It replaces the
registry that the repository names, as container runtimes recognise it: by a dot, a colon, or
"localhost". */ -}}
{{- define "kube-lxcfs.repository" -}}
{{- $registry := (first .).Values.global.imageRegistry -}}
{{- $parts := splitn "/" 2 (last .) -}}
{{- if not $registry -}}
{{- last . -}}
{{- else if and $parts._1 (regexMatch "[.:]|^localhost$" $parts._0) -}}
{{- printf "%s/%s" $registry $parts._1 -}}
{{- else -}}
{{- printf "%s/%s" $registry (last .) -}}
{{- end -}}
{{- end }}

{{- define "kube-lxcfs.agentImage" -}}
{{- include "kube-lxcfs.repository" (list . .Values.image.repository) -}}
:{{ .Values.image.tag | default .Chart.AppVersion -}}
{{- with .Values.image.digest }}@{{ . }}{{ end -}}
{{- end }}

{{- define "kube-lxcfs.lxcfsImage" -}}
{{- $default := printf "%s-lxcfs" .Values.image.repository -}}
{{- $repository := .Values.lxcfs.image.repository | default $default -}}
{{- include "kube-lxcfs.repository" (list . $repository) -}}
:{{ .Values.lxcfs.image.tag | default .Values.image.tag | default .Chart.AppVersion -}}
{{- with .Values.lxcfs.image.digest }}@{{ . }}{{ end -}}
{{- end }}

{{- /* The field imagePullSecrets of a pod spec, or nothing. Those of global may be names. */ -}}
{{- define "kube-lxcfs.pullSecrets" -}}
{{- $secrets := .Values.imagePullSecrets -}}
{{- range .Values.global.imagePullSecrets -}}
{{- $secrets = append $secrets (ternary (dict "name" .) . (kindIs "string" .)) -}}
{{- end -}}
{{- with uniq $secrets -}}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end }}

{{- /* The field nodeSelector of a pod spec: (list . "agent") */ -}}
{{- define "kube-lxcfs.nodeSelector" -}}
nodeSelector:
  {{- $values := index (first .).Values (last .) }}
  {{- merge (dict) $values.nodeSelector (dict "kubernetes.io/os" "linux") | toYaml | nindent 2 }}
{{- end }}

{{- /* Comma-separated namespaces in which only annotations inject, or nothing */ -}}
{{- define "kube-lxcfs.excludeNamespaces" -}}
{{- $excluded := .Values.excludeNamespaces -}}
{{- if and .Values.injectByDefault (not $excluded) -}}
{{- $excluded = list "kube-system" "kube-node-lease" .Release.Namespace | uniq -}}
{{- end -}}
{{- join "," $excluded -}}
{{- end }}

{{- /* Whether the agent has access to the API server: "true" or nothing */ -}}
{{- define "kube-lxcfs.usesApiServer" -}}
{{- if eq .Values.agent.podsFrom "kubernetes" }}true{{ end -}}
{{- end }}

{{- /* The agent's AppArmor profile as the value of an annotation, for Kubernetes before 1.30 */ -}}
{{- define "kube-lxcfs.appArmorAnnotation" -}}
{{- with .Values.agent.appArmorProfile -}}
{{- if eq .type "Localhost" -}}
localhost/{{ .localhostProfile }}
{{- else -}}
{{- ternary "unconfined" "runtime/default" (eq .type "Unconfined") -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- /* Selector labels of a component: (list . "agent") */ -}}
{{- define "kube-lxcfs.selector" -}}
app.kubernetes.io/name: {{ include "kube-lxcfs.name" (first .) }}
app.kubernetes.io/instance: {{ (first .).Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end }}

{{- /* Metadata of an object: (list . COMPONENT NAME-SUFFIX SCOPE [LABELS]); SCOPE is "cluster" or
"" */ -}}
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
  helm.sh/chart: {{ printf "%s-%s" $.Chart.Name $.Chart.Version | replace "+" "_" }}
  {{- $labels := dict }}
  {{- if gt (len .) 4 }}{{ $labels = index . 4 }}{{ end }}
  {{- with merge (dict) $labels $.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- /* Annotations of an object: a line of its metadata, or nothing */ -}}
{{- define "kube-lxcfs.annotations" -}}
{{- with .Values.commonAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
{{- end }}
{{- end }}

{{- /* Directory on the node that contains the mount of lxcfs, or is its mount point */ -}}
{{- define "kube-lxcfs.lxcfsVolume" -}}
{{- ternary .Values.hostPath .Values.lxcfs.hostManagedPath .Values.lxcfs.enabled -}}
{{- end }}

{{- /* Mount point of lxcfs */ -}}
{{- define "kube-lxcfs.lxcfsPath" -}}
{{- include "kube-lxcfs.lxcfsVolume" . }}{{ if .Values.lxcfs.enabled }}/lxcfs{{ end -}}
{{- end }}

{{- /* Address and port that the agent listens on */ -}}
{{- define "kube-lxcfs.listen" -}}
{{- $address := .Values.agent.listenAddress -}}
{{- ternary (printf "[%s]" $address) $address (contains ":" $address) }}:{{ .Values.agent.port -}}
{{- end }}

{{- /* Port of the agent's HTTPS, or nothing */ -}}
{{- define "kube-lxcfs.securePort" -}}
{{- regexFind "[0-9]+$" .Values.agent.secureListen -}}
{{- end }}

{{- /* Port and host of the agent's probes; the default host is the pod's address. A listener on ::
serves IPv4 too. */ -}}
{{- define "kube-lxcfs.probeTarget" -}}
port: http
{{- if .Values.agent.hostNetwork }}
{{- $address := .Values.agent.listenAddress }}
host: {{ get (dict "0.0.0.0" "127.0.0.1" "::" "127.0.0.1") $address | default $address | quote }}
{{- end }}
{{- end }}

{{- /* Fields of the DaemonSet spec that both DaemonSets share: (list . "agent") */ -}}
{{- define "kube-lxcfs.rollout" -}}
{{- $values := index (first .).Values (last .) -}}
revisionHistoryLimit: {{ $values.revisionHistoryLimit }}
minReadySeconds: {{ $values.minReadySeconds }}
updateStrategy:
  {{- toYaml $values.updateStrategy | nindent 2 }}
{{- end }}

{{- /* Fields of the pod spec that both DaemonSets share: (list . "agent") */ -}}
{{- define "kube-lxcfs.placement" -}}
{{- $ := first . -}}
{{- $values := index $.Values (last .) -}}
{{- with include "kube-lxcfs.pullSecrets" $ }}
{{- . | nindent 0 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{ include "kube-lxcfs.nodeSelector" . }}
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

{{- /* Metadata of the pods of a DaemonSet: (list . "agent") */ -}}
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
  container.apparmor.security.beta.kubernetes.io/agent: {{ include "kube-lxcfs.appArmorAnnotation" $ }}
  {{- end }}
  {{- with merge (dict) $values.podAnnotations $.Values.commonAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- /* Fields of an endpoint of a PodMonitor or ServiceMonitor, from its values. Series of an agent
are named by its node: the name of its pod changes. */ -}}
{{- define "kube-lxcfs.scrape" -}}
interval: {{ .interval }}
{{- with .scrapeTimeout }}
scrapeTimeout: {{ . }}
{{- end }}
relabelings:
  - sourceLabels: [__meta_kubernetes_pod_node_name]
    targetLabel: node
  {{- with .relabelings }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .metricRelabelings }}
metricRelabelings:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Whether a monitor scrapes the agent over HTTPS: "true" or nothing */ -}}
{{- define "kube-lxcfs.scrapesHttps" -}}
{{- $monitor := or .Values.podMonitor.enabled .Values.serviceMonitor.enabled -}}
{{- if and $monitor .Values.agent.secureListen }}true{{ end -}}
{{- end }}

{{- /* The Secret of the token with which the agent is scraped */ -}}
{{- define "kube-lxcfs.scrapeTokenSecret" -}}
{{- .Values.secureScrape.tokenSecret | default (printf "%s-metrics" (include "kube-lxcfs.fullname" .)) -}}
{{- end }}

{{- /* Fields of the agent's endpoint of a monitor: its port, and how to get it */ -}}
{{- define "kube-lxcfs.agentEndpoint" -}}
{{- if include "kube-lxcfs.scrapesHttps" . -}}
{{- with .Values.secureScrape -}}
{{- if and .ca .insecureSkipVerify }}
{{- fail "secureScrape.ca needs secureScrape.insecureSkipVerify=false: else no certificate is verified" }}
{{- end -}}
port: https
scheme: https
authorization:
  credentials:
    name: {{ include "kube-lxcfs.scrapeTokenSecret" $ }}
    key: {{ .tokenKey }}
tlsConfig:
  insecureSkipVerify: {{ .insecureSkipVerify }}
  {{- with .ca }}
  ca:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .serverName }}
  serverName: {{ . | quote }}
  {{- end }}
{{- end -}}
{{- else -}}
port: http
{{- end -}}
{{- end }}

{{- /* The field from of a rule of a NetworkPolicy */ -}}
{{- define "kube-lxcfs.ingressFrom" -}}
from:
  {{- if .Values.networkPolicy.from }}
  {{- toYaml .Values.networkPolicy.from | nindent 2 }}
  {{- else }}
  - namespaceSelector: {}
  {{- end }}
{{- end }}
