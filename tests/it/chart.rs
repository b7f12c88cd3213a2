//! The chart: helm lint, every value changed and the result validated by a real API server, invalid
//! values rejected, all values documented, and the rendered manifests up to date.

use std::{fs, path::PathBuf, process::Output};

use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::harness::*;

fn repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn helm(args: &[&str]) -> Output {
    let path = std::env::var("PATH").unwrap_or_default();
    let found = path.split(':').map(|dir| PathBuf::from(dir).join("helm")).find(|p| p.exists());
    let helm = found.unwrap_or_else(|| cache("helm/helm"));
    std::process::Command::new(helm).args(args).current_dir(repository("")).output().unwrap()
}

pub(crate) fn template(more: &[&str]) -> Output {
    helm(
        &[
            &[
                "template",
                "x",
                "charts/kube-lxcfs",
                "--namespace",
                "kube-system",
                "--kube-version",
                "1.25.0",
            ],
            more,
        ]
        .concat(),
    )
}

/// Every value, changed from its default.
const CHANGED: &[&str] = &[
    "image.repository=r.example/k,image.tag=v9,image.pullPolicy=Always,\
     imagePullSecrets[0].name=regcred",
    "nameOverride=other",
    "fullnameOverride=whole",
    "commonLabels.team=a,commonAnnotations.owner=b",
    "injectByDefault=true,adopt=true,hostPath=/opt/k",
    "runtime.criSocketPath=/run/crio/crio.sock,runtime.pidFrom=proc,runtime.events=off",
    "nri.mode=off",
    "nri.mode=required,nri.socketPath=/run/nri/n.sock",
    "log.format=json,log.level=debug",
    "agent.workers=3,agent.port=9000,agent.hostNetwork=true,agent.listenAddress=127.0.0.1",
    "agent.hostNetwork=true,agent.listenAddress=::",
    "agent.resources.requests.cpu=5m,agent.resources.limits.cpu=1,agent.nodeSelector.a=b,\
     agent.tolerations=null,agent.priorityClassName=",
    "agent.updateStrategy.type=OnDelete,agent.updateStrategy.rollingUpdate=null,\
     agent.terminationGracePeriodSeconds=5",
    "agent.podLabels.a=b,agent.podAnnotations.c=d,agent.extraArgs[0]=--adopt,\
     agent.extraEnv[0].name=A,agent.extraEnv[0].value=b",
    "agent.extraVolumes[0].name=v,agent.extraVolumes[0].emptyDir.medium=Memory,\
     agent.extraVolumeMounts[0].name=v,agent.extraVolumeMounts[0].mountPath=/v",
    "agent.seccompProfile.type=Unconfined,agent.seLinuxOptions.type=spc_t",
    "agent.appArmorProfile.type=RuntimeDefault",
    "agent.appArmorProfile.type=Localhost,agent.appArmorProfile.localhostProfile=k",
    "agent.podsFrom=cri",
    "lxcfs.enabled=false,lxcfs.hostManagedPath=/srv/lxcfs",
    "agent.events=warnings,lxcfs.port=9999",
    "prometheusRule.enabled=true,prometheusRule.runbookUrl=https://a.example/runbook.md,\
     prometheusRule.thresholds.agentAbsentFor=9m,\
     prometheusRule.thresholds.agentsUnavailable=7,\
     prometheusRule.thresholds.downFor=9m,\
     prometheusRule.thresholds.restarts=7,\
     prometheusRule.thresholds.hungWorkers=7,\
     prometheusRule.thresholds.hungWorkersFor=9m,\
     prometheusRule.thresholds.deadViewsFor=9m,\
     prometheusRule.thresholds.sweepFailures=7,\
     prometheusRule.thresholds.invalidAnnotations=7,\
     prometheusRule.thresholds.invalidAnnotationsFor=9m,\
     prometheusRule.thresholds.failed=7,\
     prometheusRule.thresholds.failedFor=9m,\
     prometheusRule.thresholds.nriLostFor=9m,\
     prometheusRule.thresholds.nodeUnsupportedFor=9m,\
     prometheusRule.thresholds.runtimeDownFor=9m,\
     prometheusRule.thresholds.watchErrors=7,\
     prometheusRule.thresholds.notSyncedSeconds=7,\
     prometheusRule.thresholds.lateStarts=7,\
     prometheusRule.thresholds.slowSeconds=7,\
     prometheusRule.thresholds.slowFor=9m,\
     prometheusRule.thresholds.checkFailedFor=9m",
    "lxcfs.image.repository=r.example/l,lxcfs.image.tag=v1,lxcfs.watchdog=800ms,\
     lxcfs.args[0]=-o,lxcfs.updateStrategy.type=OnDelete,\
     lxcfs.updateStrategy.rollingUpdate=null",
    "lxcfs.resources.requests.cpu=5m,lxcfs.resources.limits.cpu=1,lxcfs.nodeSelector.a=b,\
     lxcfs.tolerations=null,lxcfs.priorityClassName=",
    "lxcfs.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution\
     .nodeSelectorTerms[0].matchExpressions[0].key=a,\
     lxcfs.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution\
     .nodeSelectorTerms[0].matchExpressions[0].operator=Exists",
    "agent.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution\
     .nodeSelectorTerms[0].matchExpressions[0].key=a,\
     agent.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution\
     .nodeSelectorTerms[0].matchExpressions[0].operator=Exists",
    "lxcfs.updateStrategy.rollingUpdate.maxUnavailable=1,lxcfs.terminationGracePeriodSeconds=60",
    "lxcfs.podLabels.a=b,lxcfs.podAnnotations.c=d,lxcfs.extraArgs[0]=--watchdog=9s,\
     lxcfs.extraEnv[0].name=A,lxcfs.extraEnv[0].value=b",
    "lxcfs.extraVolumes[0].name=v,lxcfs.extraVolumes[0].emptyDir.medium=Memory,\
     lxcfs.extraVolumeMounts[0].name=v,lxcfs.extraVolumeMounts[0].mountPath=/v",
    "podMonitor.enabled=true,podMonitor.interval=1m,podMonitor.labels.a=b,\
     podMonitor.scrapeTimeout=5s,podMonitor.relabelings[0].action=labeldrop,\
     podMonitor.relabelings[0].regex=x,podMonitor.metricRelabelings[0].action=labeldrop,\
     podMonitor.metricRelabelings[0].regex=x",
    "serviceMonitor.enabled=true,serviceMonitor.interval=1m,serviceMonitor.labels.a=b,\
     serviceMonitor.scrapeTimeout=5s,serviceMonitor.relabelings[0].action=labeldrop,\
     serviceMonitor.relabelings[0].regex=x,serviceMonitor.metricRelabelings[0].action=labeldrop,\
     serviceMonitor.metricRelabelings[0].regex=x",
    "global.imageRegistry=r.example:5000,global.imagePullSecrets[0]=a,\
     global.imagePullSecrets[1].name=b",
    DIGESTS,
    "agent.minReadySeconds=3,agent.revisionHistoryLimit=2,\
     lxcfs.minReadySeconds=3,lxcfs.revisionHistoryLimit=2",
    "lxcfs.log.format=json,lxcfs.log.level=debug",
    "podSelector=team=a,namespaceSelector=!batch,excludeNamespaces[0]=kube-system",
    "openshift.scc=true",
    "lxcfs.seLinuxOptions.type=spc_t",
    "prometheusRule.enabled=true,prometheusRule.labels.a=b,dashboard.enabled=true,\
     dashboard.labels.a=b,test.image=b:2,test.pullPolicy=Never",
    "rbac.create=false,serviceAccount.create=false,serviceAccount.name=mine",
    "serviceAccount.annotations.a=b,networkPolicy.enabled=true,\
     networkPolicy.from[0].podSelector.matchLabels.a=b",
    "serviceMonitor.enabled=true,prometheusRule.enabled=true,dashboard.enabled=true,\
     networkPolicy.enabled=true",
    EVENT_POLICY,
    "agent.secureListen=[::]:9810,networkPolicy.enabled=true",
    SECURE_SCRAPE,
    "agent.secureListen=[::]:9810,serviceMonitor.enabled=true,secureScrape.tokenSecret=t,\
     secureScrape.tokenKey=k,secureScrape.insecureSkipVerify=false,\
     secureScrape.ca.secret.name=c,secureScrape.ca.secret.key=ca.crt,secureScrape.serverName=n",
];

const DIGESTS: &str = "image.digest=\
     sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef,lxcfs.image.digest=\
     sha256:fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210";

const SECURE_SCRAPE: &str =
    "agent.secureListen=[::]:9810,podMonitor.enabled=true,commonAnnotations.owner=b";

/// Needs a newer API server than that of these tests.
const EVENT_POLICY: &str = "eventPolicy.enabled=true";

#[test]
fn every_value_renders_valid_objects() {
    isolated(|| {
        let lint = helm(&["lint", "--strict", "charts/kube-lxcfs"]);
        assert!(lint.status.success(), "{}", stdout(&lint));
        let (cluster, dir) = (Cluster::start(), tempfile::tempdir().unwrap());
        let plain = stdout(&template(&[]));
        for &changed in CHANGED {
            let version: &[&str] =
                if changed == EVENT_POLICY { &["--kube-version", "1.30.0"] } else { &[] };
            let rendered = template(&[version, &["--set", changed]].concat());
            assert!(rendered.status.success(), "{changed}: {}", stderr(&rendered));
            let rendered = stdout(&rendered);
            assert_ne!(rendered, plain, "{changed} has no effect");
            let blank = rendered.lines().find(|line| line.ends_with(' '));
            assert_eq!(blank, None, "{changed}: trailing whitespace");
            if changed == EVENT_POLICY {
                continue;
            }
            // This API server does not know the kinds of the Prometheus operator.
            let known: Vec<&str> = rendered
                .split("\n---\n")
                .filter(|one| !one.contains("apiVersion: monitoring.coreos.com"))
                .collect();
            let file = dir.path().join("rendered.yaml");
            fs::write(&file, known.join("\n---\n")).unwrap();
            cluster.kubectl(&[
                "apply",
                "--dry-run=server",
                "--validate=true",
                "-f",
                file.to_str().unwrap(),
            ]);
        }
        for preset in presets() {
            let rendered = template(&["--values", preset.to_str().unwrap()]);
            assert!(rendered.status.success(), "{preset:?}: {}", stderr(&rendered));
            assert_ne!(stdout(&rendered), plain, "{preset:?} has no effect");
            let file = dir.path().join("rendered.yaml");
            fs::write(&file, rendered.stdout).unwrap();
            let file = file.to_str().unwrap();
            cluster.kubectl(&["apply", "--dry-run=server", "--validate=true", "-f", file]);
        }
        // A dry run creates no namespace for the objects in it.
        cluster.kubectl(&["create", "namespace", "kube-lxcfs"]);
        for example in fs::read_dir(repository("manifests/examples")).unwrap() {
            cluster.kubectl(&[
                "apply",
                "--dry-run=server",
                "--validate=true",
                "-f",
                example.unwrap().path().to_str().unwrap(),
            ]);
        }
    });
}

fn presets() -> Vec<PathBuf> {
    let files = fs::read_dir(repository("charts/kube-lxcfs/presets")).unwrap();
    let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn each_preset_has_status_and_source() {
    let names = presets().into_iter().map(|file| {
        let text = fs::read_to_string(&file).unwrap();
        let status = text.lines().find_map(|line| line.strip_prefix("# Status: "));
        let known = status.is_some_and(|s| s.starts_with("tested.") || s.starts_with("expected."));
        assert!(known, "{file:?}: {status:?}");
        assert!(text.contains("\n# Source: https://"), "{file:?}");
        file.file_stem().unwrap().to_str().unwrap().to_owned()
    });
    let expected = [
        "aks",
        "bottlerocket",
        "eks-al2023",
        "gke-cos",
        "k0s",
        "k3s",
        "kind",
        "microk8s",
        "minikube",
        "openshift",
        "rke2",
        "selinux",
        "talos",
    ];
    assert_eq!(names.collect::<Vec<_>>(), expected);
}

#[test]
fn selectors_and_exclusions_reach_the_agent() {
    let env = |values: &str, name: &str| {
        let rendered = stdout(&template(&["--set", values]));
        let after = rendered.split_once(&format!("- name: {name}\n"));
        after.map(|(_, rest)| fields(rest, "value")[0].to_owned())
    };
    let excluded = |values: &str| env(values, "KUBE_LXCFS_EXCLUDE_NAMESPACES");
    assert_eq!(excluded("adopt=true"), None);
    // The release is in kube-system.
    assert_eq!(excluded("injectByDefault=true").as_deref(), Some("kube-system,kube-node-lease"));
    let own = stdout(&template(&["--set", "injectByDefault=true", "--namespace", "own"]));
    assert!(own.contains("\"kube-system,kube-node-lease,own\""), "{own}");
    let named = "injectByDefault=true,excludeNamespaces={a,b}";
    assert_eq!(excluded(named).as_deref(), Some("a,b"));
    let selector = env("podSelector=tier in (web\\,api)", "KUBE_LXCFS_POD_SELECTOR");
    assert_eq!(selector.as_deref(), Some("tier in (web,api)"));
    let without_api = template(&["--set", "namespaceSelector=a,agent.podsFrom=cri"]);
    let error = stderr(&without_api);
    assert!(error.contains("needs agent.podsFrom=kubernetes"), "{error}");
}

/// In a rolling update of both DaemonSets, the pods of neither wait for those of the other.
#[test]
fn readiness_of_the_agent_excludes_a_supervised_lxcfs() {
    for (values, paths) in [
        ("adopt=false", ["/healthz", "/healthz", "/readyz?exclude=lxcfs"]),
        ("lxcfs.enabled=false", ["/healthz", "/healthz", "/readyz"]),
    ] {
        let file = "templates/agent.yaml";
        let rendered = stdout(&template(&["--show-only", file, "--set", values]));
        let probes: Vec<&str> = fields(&rendered, "path")
            .into_iter()
            .filter(|path| path.ends_with('z') || path.contains('?'))
            .collect();
        assert_eq!(probes, paths, "{values}");
    }
}

/// No site of the project exists. The domain in annotations and labels is a name, not an address.
#[test]
fn chart_links_to_no_site_of_its_own() {
    let chart = repository("charts/kube-lxcfs");
    for file in ["Chart.yaml", "values.yaml", "README.md", "templates/monitoring.yaml"] {
        let text = fs::read_to_string(chart.join(file)).unwrap();
        assert!(!text.contains("://kube-lxcfs.io"), "{file}");
    }
    let krew = fs::read_to_string(repository("manifests/krew/lxcfs.yaml")).unwrap();
    assert!(!krew.contains("://kube-lxcfs.io"), "{krew}");
}

#[test]
fn notes_name_the_next_commands() {
    let args = ["install", "x", "charts/kube-lxcfs", "--dry-run=client", "--namespace", "own"];
    let output = helm(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    let notes = text.split_once("NOTES:\n").unwrap().1;
    for command in [
        "kubectl --namespace own rollout status daemonset/x-kube-lxcfs-agent",
        "kubectl --namespace own rollout status daemonset/x-kube-lxcfs-lxcfs",
        "kubectl --namespace own exec daemonset/x-kube-lxcfs-agent -- kube-lxcfs check",
        "helm test x --namespace own",
        "kubectl annotate pod NAME kube-lxcfs.io/inject=true",
    ] {
        assert!(notes.lines().any(|line| line.trim() == command), "{command}: {notes}");
    }
}

/// With `agent.podsFrom=cri`, the annotation of a running pod has no effect.
#[test]
fn notes_without_api_server_name_the_template() {
    let args = ["install", "x", "charts/kube-lxcfs", "--dry-run=client"];
    let notes = |values: &str| {
        let output = helm(&[&args[..], &["--set", values]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output).split_once("NOTES:\n").unwrap().1.to_owned()
    };
    let [cri, kubernetes] =
        ["cri", "kubernetes"].map(|source| notes(&format!("agent.podsFrom={source}")));
    for line in [
        "To inject views, set this annotation in the template of new pods.",
        "effect, because agent.podsFrom is cri:",
        "kube-lxcfs.io/inject: \"true\"",
    ] {
        let is = |text: &&str| text.trim().starts_with(line);
        assert_eq!(cri.lines().filter(is).count(), 1, "{line}: {cri}");
        assert_eq!(kubernetes.lines().filter(is).count(), 0, "{line}: {kubernetes}");
    }
    assert!(!cri.contains("kubectl annotate") && kubernetes.contains("kubectl annotate"), "{cri}");
}

#[test]
fn event_policy_has_known_fields_only() {
    fn has_known_fields_only<T: Serialize + DeserializeOwned>(object: &Value) {
        let known: T = serde_json::from_value(object.clone()).unwrap();
        assert_eq!(serde_json::to_value(known).unwrap(), *object);
    }
    let rendered = template(&["--kube-version", "1.30.0", "--set", EVENT_POLICY]);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("object.yaml");
    let mut kinds = Vec::new();
    for object in stdout(&rendered).split("\n---\n") {
        if !object.contains("apiVersion: admissionregistration.k8s.io/v1") {
            continue;
        }
        fs::write(&file, object).unwrap();
        let file = file.to_str().unwrap();
        let args = ["label", "--local", "-o", "json", "a=b", "-f", file];
        let json = program("kubectl").args(args).output().unwrap();
        assert!(json.status.success(), "{}", stderr(&json));
        let object: Value = serde_json::from_slice(&json.stdout).unwrap();
        let kind = object["kind"].as_str().unwrap().to_owned();
        match &*kind {
            "ValidatingAdmissionPolicy" => {
                has_known_fields_only::<ValidatingAdmissionPolicy>(&object);
            }
            _ => has_known_fields_only::<ValidatingAdmissionPolicyBinding>(&object),
        }
        kinds.push(kind);
    }
    assert_eq!(kinds, ["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"]);
    for (values, message) in [
        ("eventPolicy.enabled=true", "needs Kubernetes 1.30"),
        ("eventPolicy.enabled=true,agent.podsFrom=cri", "needs agent.podsFrom=kubernetes"),
    ] {
        let rejected = template(&["--set", values]);
        assert!(stderr(&rejected).contains(message), "{values}: {}", stderr(&rejected));
    }
}

#[test]
fn secure_listener_adds_port_and_rules() {
    let render = |values: &str| stdout(&template(&["--set", values]));
    let plain = render("networkPolicy.enabled=true");
    let secure = render("networkPolicy.enabled=true,agent.secureListen=0.0.0.0:9810");
    for added in [
        "            - name: https\n              containerPort: 9810\n",
        "        - port: 9810\n          protocol: TCP\n",
        "- name: KUBE_LXCFS_SECURE_LISTEN\n              value: \"0.0.0.0:9810\"\n",
        "    resources: [tokenreviews]\n    verbs: [create]\n",
        "    resources: [subjectaccessreviews]\n    verbs: [create]\n",
    ] {
        assert_eq!(secure.matches(added).count(), 1, "{added}");
        assert!(!plain.contains(added), "{added}");
    }
    let without_api = template(&["--set", "agent.secureListen=[::]:1,agent.podsFrom=cri"]);
    let error = stderr(&without_api);
    assert!(error.contains("agent.secureListen needs agent.podsFrom=kubernetes"), "{error}");
}

/// The objects of a kind and a component.
fn objects<'a>(rendered: &'a str, kind: &str, component: &str) -> Vec<&'a str> {
    let kind = format!("kind: {kind}\n");
    let component = format!("app.kubernetes.io/component: {component}\n");
    let is = |object: &&str| object.contains(&kind) && object.contains(&component);
    rendered.split("\n---\n").filter(is).collect()
}

#[test]
fn monitors_scrape_https_if_it_is_served() {
    let render = |values: &str| stdout(&template(&["--set", values]));
    for (monitor, kind, field) in [
        ("podMonitor", "PodMonitor", "podMetricsEndpoints"),
        ("serviceMonitor", "ServiceMonitor", "endpoints"),
    ] {
        let plain = render(&format!("{monitor}.enabled=true"));
        let [endpoint] = objects(&plain, kind, "agent")[..] else { panic!("{plain}") };
        let http = format!("  {field}:\n    - port: http\n      interval: 30s\n");
        assert!(endpoint.contains(&http) && !endpoint.contains("authorization:"), "{endpoint}");
        assert!(!plain.contains("name: x-kube-lxcfs-metrics"), "{plain}");

        let values = format!("{monitor}.enabled=true,agent.secureListen=0.0.0.0:9810");
        let secure = render(&values);
        let [endpoint] = objects(&secure, kind, "agent")[..] else { panic!("{secure}") };
        let https = format!(
            "  {field}:\n    - port: https\n      scheme: https\n      authorization:\n        \
             credentials:\n          name: x-kube-lxcfs-metrics\n          key: token\n      \
             tlsConfig:\n        insecureSkipVerify: true\n      interval: 30s\n"
        );
        assert!(endpoint.contains(&https) && !endpoint.contains("http\n"), "{endpoint}");
        // The token is that of a user who may get the metrics, and nothing else.
        let [token] = objects(&secure, "Secret", "agent")[..] else { panic!("{secure}") };
        let user = fields(token, "kubernetes.io/service-account.name");
        assert_eq!(user, ["x-kube-lxcfs-metrics"]);
        assert_eq!(fields(token, "name"), user);
        let rules = "\nrules:\n  - nonResourceURLs: [/metrics]\n    verbs: [get]\n---\n";
        assert_eq!(secure.matches(rules).count(), 1, "{secure}");
        // The supervisor serves no HTTPS.
        let [lxcfs] = objects(&secure, kind, "lxcfs")[..] else { panic!("{secure}") };
        assert!(lxcfs.contains(&format!("  {field}:\n    - port: metrics\n      interval")));

        let verified = render(&format!(
            "{values},secureScrape.tokenSecret=t,secureScrape.tokenKey=k,\
             secureScrape.insecureSkipVerify=false,secureScrape.ca.configMap.name=c,\
             secureScrape.ca.configMap.key=ca.crt,secureScrape.serverName=agents"
        ));
        let [endpoint] = objects(&verified, kind, "agent")[..] else { panic!("{verified}") };
        let https = "      authorization:\n        credentials:\n          name: t\n          \
                     key: k\n      tlsConfig:\n        insecureSkipVerify: false\n        \
                     ca:\n          configMap:\n            key: ca.crt\n            \
                     name: c\n        serverName: \"agents\"\n";
        assert!(endpoint.contains(https), "{endpoint}");
        assert!(!verified.contains("x-kube-lxcfs-metrics"), "{verified}");
    }
    let secure = render("serviceMonitor.enabled=true,agent.secureListen=0.0.0.0:9810");
    let [service] = objects(&secure, "Service", "agent")[..] else { panic!("{secure}") };
    assert!(service.contains("    - name: https\n      port: 9810\n      targetPort: https"));
    let contradiction = "secureScrape.ca.secret.name=c,secureScrape.ca.secret.key=k";
    let rejected = template(&["--set", &format!("{SECURE_SCRAPE},{contradiction}")]);
    let error = stderr(&rejected);
    assert!(error.contains("needs secureScrape.insecureSkipVerify=false"), "{error}");
}

/// The directory in which the documentation mounts them, and which the agent must detach.
#[test]
fn apparmor_profile_allows_the_tls_files() {
    let profile = include_str!("../../charts/kube-lxcfs/profiles/apparmor-agent");
    let operations = include_str!("../../docs/operations.md");
    let directory = profile.lines().find_map(|line| line.strip_prefix("@{tls} = ")).unwrap();
    for file in ["--tls-cert-file", "--tls-key-file"] {
        assert!(operations.contains(&format!("- {file}={directory}/tls.")), "{file}");
    }
    assert!(operations.contains(&format!("mountPath: {directory},")));
    for rule in ["  @{tls}/** r,\n", "  umount @{tls}/,\n"] {
        assert!(profile.contains(rule), "{rule}");
    }
}

#[test]
fn network_policies_cover_every_port() {
    let from = "      from:\n        - podSelector:\n            matchLabels:\n              a: b";
    let render = |more: &str| {
        let values = format!(
            "networkPolicy.enabled=true,networkPolicy.from[0].podSelector.matchLabels.a=b{more}"
        );
        stdout(&template(&["--set", &values]))
    };
    let policies = |rendered: &str| {
        let kind = "kind: NetworkPolicy\n";
        let objects = rendered.split("\n---\n").filter(|object| object.contains(kind));
        let policy = |object: &str| {
            assert!(object.trim_end().ends_with(from), "{object}");
            let component = fields(object, "app.kubernetes.io/component");
            // Of the policy, and of its pods.
            assert_eq!(component[0], component[1], "{object}");
            let ports = object.lines().filter_map(|line| line.trim().strip_prefix("- port: "));
            (component[0].to_owned(), ports.map(ToOwned::to_owned).collect::<Vec<_>>())
        };
        objects.map(policy).collect::<Vec<_>>()
    };
    let expected = |component: &str, ports: &[&str]| {
        (component.to_owned(), ports.iter().map(|port| (*port).to_owned()).collect::<Vec<_>>())
    };
    let rendered = render(",agent.port=9000,agent.secureListen=[::]:9810,lxcfs.port=9999");
    let both = [expected("agent", &["9000", "9810"]), expected("lxcfs", &["9999"])];
    assert_eq!(policies(&rendered), both);
    // Every port that a container declares is one of these.
    let declared: Vec<&str> = fields(&rendered, "containerPort");
    assert_eq!(declared, ["9000", "9810", "9999"]);
    assert_eq!(policies(&render(",lxcfs.enabled=false")), [expected("agent", &["9808"])]);
}

#[test]
fn agent_without_api_server_has_no_token() {
    let rendered = stdout(&template(&["--set", "agent.podsFrom=cri"]));
    for absent in ["kind: ServiceAccount", "kind: ClusterRole", "serviceAccountName: x-kube-lxcfs"]
    {
        assert!(!rendered.contains(absent), "{absent}");
        assert!(stdout(&template(&[])).contains(absent), "{absent}");
    }
    // The agent's and lxcfs's.
    assert_eq!(rendered.matches("automountServiceAccountToken: false").count(), 2);
    assert_eq!(
        rendered.matches("name: KUBE_LXCFS_PODS_FROM\n              value: \"cri\"").count(),
        1
    );
}

#[test]
fn apparmor_profile_is_an_annotation_before_1_30() {
    let localhost = "agent.appArmorProfile.type=Localhost,agent.appArmorProfile.localhostProfile=k";
    for (values, profile) in [
        ("adopt=false", "unconfined"),
        ("agent.appArmorProfile.type=RuntimeDefault", "runtime/default"),
        (localhost, "localhost/k"),
    ] {
        let line = format!("container.apparmor.security.beta.kubernetes.io/agent: {profile}\n");
        let rendered = stdout(&template(&["--set", values]));
        assert!(rendered.contains(&line) && !rendered.contains("appArmorProfile:"), "{values}");
        let newer = stdout(&template(&["--kube-version", "1.30.0", "--set", values]));
        assert!(newer.contains("appArmorProfile:") && !newer.contains(&line), "{values}");
    }
}

#[test]
fn schema_rejects_unknown_and_malformed_values() {
    for (invalid, message) in [
        ("image.pulPolicy=x", "'pulPolicy' not allowed"),
        ("nri.mode=maybe", "'/nri/mode': value must be one of 'auto', 'off', 'required'"),
        ("hostPath=var/lib", "'/hostPath'"),
        ("agent.listenAddress=[::1]", "'/agent/listenAddress'"),
        ("agent.listenAddress=localhost", "'/agent/listenAddress'"),
        ("agent.port=99999", "'/agent/port'"),
        ("agent.secureListen=9810", "'/agent/secureListen'"),
        ("agent.secureListen=::1:9810", "'/agent/secureListen'"),
        ("lxcfs.watchdog=soon", "'/lxcfs/watchdog'"),
        ("nonsense=1", "'nonsense' not allowed"),
        ("lxcfs.hostManagedPath=/srv/", "'/lxcfs/hostManagedPath'"),
        ("runtime.criSocketPath=run/cri.sock", "'/runtime/criSocketPath'"),
        ("nri.socketPath=/run/nri/", "'/nri/socketPath'"),
        ("nri.socketPath=", "'/nri/socketPath'"),
        ("agent.tolerations[0].operator=Some", "operator"),
        ("agent.podsFrom=nri", "'/agent/podsFrom'"),
        ("agent.appArmorProfile.type=Localhost", "localhostProfile"),
        ("agent.appArmorProfile.localhostProfile=k", "'/agent/appArmorProfile'"),
        ("global.imageRegistri=r.example", "'imageRegistri' not allowed"),
        ("global.imageRegistry=r.example/", "'/global/imageRegistry'"),
        ("image.digest=0123", "'/image/digest'"),
        ("excludeNamespaces[0]=a_b", "'/excludeNamespaces/0'"),
        ("agent.minReadySeconds=-1", "'/agent/minReadySeconds'"),
        ("podMonitor.scrapeTimeout=soon", "'/podMonitor/scrapeTimeout'"),
        ("prometheusRule.runbookUrl=", "'/prometheusRule/runbookUrl'"),
        ("prometheusRule.runbookUrl=a#b", "'/prometheusRule/runbookUrl'"),
        ("secureScrape.ca.name=c", "'/secureScrape/ca'"),
        ("secureScrape.ca.secret.name=c", "'/secureScrape/ca/secret'"),
    ] {
        let rejected = template(&["--set", invalid]);
        assert!(
            !rejected.status.success() && stderr(&rejected).contains(message),
            "{invalid}: {}",
            stderr(&rejected)
        );
    }
}

#[test]
fn reserved_labels_are_rejected() {
    for label in
        ["app\\.kubernetes\\.io/name", "app\\.kubernetes\\.io/component", "helm\\.sh/chart"]
    {
        for labels in [
            "commonLabels",
            "agent.podLabels",
            "lxcfs.podLabels",
            "podMonitor.labels",
            "serviceMonitor.labels",
            "prometheusRule.labels",
            "dashboard.labels",
        ] {
            let rejected = template(&["--set", &format!("{labels}.{label}=x")]);
            let place = format!("at '/{}/", labels.replace('.', "/"));
            assert!(!rejected.status.success(), "{labels}.{label}");
            assert!(stderr(&rejected).contains(&place), "{place}: {}", stderr(&rejected));
        }
    }
}

/// The values of a field in rendered objects, in their order.
fn fields<'a>(rendered: &'a str, name: &str) -> Vec<&'a str> {
    let values = rendered.lines().filter_map(|line| line.trim().strip_prefix(name));
    values.filter_map(|rest| rest.strip_prefix(':')).map(|v| v.trim().trim_matches('"')).collect()
}

#[test]
fn images_have_registry_and_digest() {
    let version = env!("CARGO_PKG_VERSION");
    let images = |values: &str| {
        let rendered = stdout(&template(&["--set", values]));
        fields(&rendered, "image").into_iter().map(ToOwned::to_owned).collect::<Vec<_>>()
    };
    let plain = [format!("kube-lxcfs:{version}"), format!("kube-lxcfs-lxcfs:{version}")];
    assert_eq!(images("adopt=false")[..2], plain);
    let within = |registry: &str| {
        [
            format!("{registry}/kube-lxcfs:{version}"),
            format!("{registry}/kube-lxcfs-lxcfs:{version}"),
            format!("{registry}/busybox:1"),
        ]
    };
    assert_eq!(images("global.imageRegistry=r.example:5000"), within("r.example:5000"));
    for repository in ["other.example/a/kube-lxcfs", "localhost/a/kube-lxcfs", "a/kube-lxcfs"] {
        let values = format!("global.imageRegistry=r.example,image.repository={repository}");
        assert_eq!(images(&values)[..2], within("r.example/a")[..2], "{repository}");
    }
    let digests = images(DIGESTS);
    assert!(digests[0].starts_with(&format!("kube-lxcfs:{version}@sha256:0123")), "{digests:?}");
    assert!(digests[1].starts_with(&format!("kube-lxcfs-lxcfs:{version}@sha256:fedc")));
}

#[test]
fn pull_secrets_of_chart_and_global_are_joined() {
    let values = "imagePullSecrets[0].name=a,global.imagePullSecrets[0]=b,\
                  global.imagePullSecrets[1].name=a";
    let rendered = stdout(&template(&["--set", values]));
    for indent in ["      ", "  "] {
        let joined =
            format!("\n{indent}imagePullSecrets:\n{indent}  - name: a\n{indent}  - name: b\n");
        let after = rendered.split(&joined).nth(1).unwrap_or_default();
        assert!(!after.is_empty() && !after.trim_start().starts_with('-'), "{joined}: {rendered}");
    }
}

#[test]
fn pods_run_on_linux_nodes_only() {
    // The agent, lxcfs and the pod of `helm test`.
    let rendered = stdout(&template(&["--set", "agent.nodeSelector.a=b,lxcfs.nodeSelector.a=b"]));
    assert_eq!(fields(&rendered, "kubernetes.io/os"), ["linux"; 3]);
    assert_eq!(fields(&rendered, "a"), ["b"; 3]);
}

#[test]
fn log_of_the_agent_does_not_change_lxcfs() {
    let lxcfs = |values: &str| {
        let file = "templates/lxcfs.yaml";
        stdout(&template(&["--show-only", file, "--set", values]))
    };
    let plain = lxcfs("adopt=false");
    assert!(plain.contains("RUST_LOG"));
    for agents in ["log.level=debug", "log.format=json", "agent.workers=3", "agent.podLabels.a=b"] {
        assert_eq!(lxcfs(agents), plain, "{agents}");
    }
    assert_ne!(lxcfs("lxcfs.log.level=debug"), plain);
}

#[test]
fn monitor_names_the_node_and_has_one_kind() {
    for monitor in ["podMonitor", "serviceMonitor"] {
        let rendered = stdout(&template(&["--set", &format!("{monitor}.enabled=true")]));
        let relabeling = "      relabelings:\n        \
                          - sourceLabels: [__meta_kubernetes_pod_node_name]\n          \
                          targetLabel: node\n";
        assert!(rendered.contains(relabeling), "{rendered}");
    }
    let both = template(&["--set", "podMonitor.enabled=true,serviceMonitor.enabled=true"]);
    assert!(stderr(&both).contains("exclude each other"), "{}", stderr(&both));
}

#[test]
fn chart_label_of_a_build_version_is_valid() {
    let dir = tempfile::tempdir().unwrap();
    let chart = repository("charts/kube-lxcfs");
    let (source, target) = (chart.to_str().unwrap(), dir.path().to_str().unwrap());
    let copied = std::process::Command::new("cp").args(["-r", source, target]).status().unwrap();
    assert!(copied.success());
    let file = dir.path().join("kube-lxcfs/Chart.yaml");
    let text = fs::read_to_string(&file).unwrap();
    let version = format!("version: {}", env!("CARGO_PKG_VERSION"));
    fs::write(&file, text.replacen(&version, "version: 1.2.3-rc.1+build.5", 1)).unwrap();
    let rendered = helm(&["template", "x", file.parent().unwrap().to_str().unwrap()]);
    let labels = stdout(&rendered);
    let labels = fields(&labels, "helm.sh/chart");
    assert!(!labels.is_empty());
    assert!(labels.iter().all(|label| *label == "kube-lxcfs-1.2.3-rc.1_build.5"), "{labels:?}");
}

#[test]
fn every_value_is_tested_and_documented() {
    let readme = fs::read_to_string(repository("charts/kube-lxcfs/README.md")).unwrap();
    let values = fs::read_to_string(repository("charts/kube-lxcfs/values.yaml")).unwrap();
    let mut path: Vec<&str> = Vec::new();
    let mut count = 0;
    for line in values.lines() {
        let Some((key, value)) =
            line.split_once(':').filter(|(key, _)| key.trim().chars().all(char::is_alphanumeric))
        else {
            continue;
        };
        path.truncate((key.len() - key.trim_start().len()) / 2);
        path.push(key.trim());
        if !value.trim().is_empty() {
            count += 1;
            let name = path.join(".");
            let sets = |values: &str| {
                values.split(',').any(|one| {
                    one.strip_prefix(&*name).is_some_and(|rest| rest.starts_with(['=', '.', '[']))
                })
            };
            assert!(CHANGED.iter().copied().any(sets), "no test sets {name}");
            assert!(readme.contains(&format!("| `{name}` |")), "README.md lacks {name}");
        }
    }
    assert!(count > 60, "{count}");
}

#[test]
fn install_manifest_is_accepted_and_its_images_can_be_set() {
    isolated(|| {
        let (cluster, dir) = (Cluster::start(), tempfile::tempdir().unwrap());
        let mut images = Vec::new();
        for file in ["install.yaml", "kustomization.yaml"] {
            let text = fs::read_to_string(repository("manifests").join(file)).unwrap();
            assert_eq!(text.lines().find(|line| line.ends_with(' ')), None, "{file}");
            let text = text.replace("newName: ", "newName: r.example/");
            fs::write(dir.path().join(file), text).unwrap();
        }
        let rendered = program("kubectl").arg("kustomize").arg(dir.path()).output().unwrap();
        assert!(rendered.status.success(), "{}", stderr(&rendered));
        let rendered = stdout(&rendered);
        images.extend(fields(&rendered, "image"));
        let version = env!("CARGO_PKG_VERSION");
        let [agent, lxcfs] =
            ["kube-lxcfs", "kube-lxcfs-lxcfs"].map(|name| format!("r.example/{name}:{version}"));
        assert_eq!(images, [agent, lxcfs]);
        // This API server is older than the field appArmorProfile.
        let file = dir.path().join("rendered.yaml");
        fs::write(&file, &rendered).unwrap();
        cluster.kubectl(&["apply", "--validate=true", "-f", file.to_str().unwrap()]);
        assert_eq!(fields(&rendered, "pod-security.kubernetes.io/enforce"), ["privileged"]);
    });
}

#[test]
fn manifests_are_rendered_from_the_chart() {
    let check = std::process::Command::new(repository("hack/manifests.sh"))
        .arg("--check")
        .output()
        .unwrap();
    assert!(check.status.success(), "{}", stderr(&check));
}
