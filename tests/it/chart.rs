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

fn template(more: &[&str]) -> Output {
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
const CHANGED: [&str; 33] = [
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
     serviceMonitor.enabled=true,serviceMonitor.interval=1m,serviceMonitor.labels.a=b",
    "prometheusRule.enabled=true,prometheusRule.labels.a=b,dashboard.enabled=true,\
     dashboard.labels.a=b,test.image=b:2,test.pullPolicy=Never",
    "rbac.create=false,serviceAccount.create=false,serviceAccount.name=mine",
    "serviceAccount.annotations.a=b,networkPolicy.enabled=true,\
     networkPolicy.from[0].podSelector.matchLabels.a=b",
    "podMonitor.enabled=true,serviceMonitor.enabled=true,prometheusRule.enabled=true,\
     dashboard.enabled=true,networkPolicy.enabled=true",
    EVENT_POLICY,
];

/// Needs a newer API server than that of these tests.
const EVENT_POLICY: &str = "eventPolicy.enabled=true";

#[test]
fn every_value_renders_valid_objects() {
    isolated(|| {
        let lint = helm(&["lint", "--strict", "charts/kube-lxcfs"]);
        assert!(lint.status.success(), "{}", stdout(&lint));
        let (cluster, dir) = (Cluster::start(), tempfile::tempdir().unwrap());
        let plain = stdout(&template(&[]));
        for changed in CHANGED {
            let version: &[&str] =
                if changed == EVENT_POLICY { &["--kube-version", "1.30.0"] } else { &[] };
            let rendered = template(&[version, &["--set", changed]].concat());
            assert!(rendered.status.success(), "{changed}: {}", stderr(&rendered));
            let rendered = stdout(&rendered);
            assert_ne!(rendered, plain, "{changed} has no effect");
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
            assert!(CHANGED.into_iter().any(sets), "no test sets {name}");
            assert!(readme.contains(&format!("| `{name}` |")), "README.md lacks {name}");
        }
    }
    assert!(count > 60, "{count}");
}

#[test]
fn manifests_are_rendered_from_the_chart() {
    let check = std::process::Command::new(repository("hack/manifests.sh"))
        .arg("--check")
        .output()
        .unwrap();
    assert!(check.status.success(), "{}", stderr(&check));
}
