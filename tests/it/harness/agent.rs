//! The agent, and its HTTP endpoints.

use std::{
    io::{Read, Write},
    path::Path,
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
};

use serde_json::Value;

use super::{Running, eventually, kube_lxcfs, program, stderr, stdout};

/// Runs the agent until the end of the test, with a JSON log.
pub(crate) fn agent(dir: &Path, args: &[&str], env: &[(&str, &str)]) -> Running {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let mut command = kube_lxcfs();
    command.args(["agent", "--log-format", "json"]).args(args);
    if !args.contains(&"--listen") {
        command.args(["--listen", "127.0.0.1:0"]);
    }
    if std::env::var_os("RUST_LOG").is_none() {
        command.env("RUST_LOG", "kube_lxcfs=debug");
    }
    command.envs(env.iter().copied());
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    Running::start(&mut command, &dir.join(format!("agent-{number}.log")))
}

/// The address that an agent listens on.
pub(crate) fn http_address(agent: &Running) -> String {
    logged_address(agent, "http_address")
}

/// The address of its HTTPS.
pub(crate) fn https_address(agent: &Running) -> String {
    logged_address(agent, "https_address")
}

fn logged_address(agent: &Running, field: &str) -> String {
    eventually("the agent listens", || {
        let entries = agent.entries();
        let address = entries.iter().find_map(|entry| entry[field].as_str());
        address.map(str::to_owned).ok_or_else(|| agent.log())
    })
}

/// The status and the body of a response of the agent.
pub(crate) fn get(agent: &Running, path: &str) -> (u16, String) {
    get_from(&http_address(agent), path)
}

/// The same, of the server at this address.
pub(crate) fn get_from(address: &str, path: &str) -> (u16, String) {
    let (head, body) = response(address, path, "*/*");
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body)
}

/// The head, with all line ends, and the body of a response to a client that accepts these formats.
pub(crate) fn response(address: &str, path: &str, accept: &str) -> (String, String) {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let request = format!("GET {path} HTTP/1.0\r\nHost: x\r\nAccept: {accept}\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (format!("{head}\r\n"), body.to_owned())
}

/// The status and the body of a response over TLS to a client with this token and these options of
/// `openssl s_client`.
pub(crate) fn get_secure(
    address: &str,
    path: &str,
    token: Option<&str>,
    options: &[&str],
) -> Result<(u16, String), String> {
    let authorization =
        token.map_or_else(String::new, |t| format!("Authorization: Bearer {t}\r\n"));
    let request = format!("GET {path} HTTP/1.0\r\nHost: x\r\n{authorization}\r\n");
    let mut client = program("openssl");
    client.args(["s_client", "-quiet", "-connect", address]).args(options);
    client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut client = client.spawn().unwrap();
    let _ = client.stdin.take().unwrap().write_all(request.as_bytes());
    let output = client.wait_with_output().unwrap();
    let response = stdout(&output);
    let Some((head, body)) = response.split_once("\r\n\r\n") else {
        return Err(stderr(&output));
    };
    Ok((head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned()))
}

/// The value of a metric, given as `name{labels}`, without the prefix. 0 if it has no value yet.
pub(crate) fn metric(agent: &Running, name: &str) -> f64 {
    let (code, text) = get(agent, "/metrics");
    assert_eq!(code, 200, "{text}");
    let name = format!("kube_lxcfs_{name}");
    let line = text.lines().find_map(|line| line.strip_prefix(&name)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.parse().unwrap())
}

/// The rows of `/status`.
pub(crate) fn status(agent: &Running) -> Vec<Value> {
    let (code, text) = get(agent, "/status");
    assert_eq!(code, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// Waits until the agent is ready.
pub(crate) fn ready(agent: &Running) {
    eventually("the agent is ready", || match get(agent, "/readyz") {
        (200, _) => Ok(()),
        (_, why) => Err(why),
    });
}

/// Waits until an agent has reconciled a container, named `namespace/pod/container`.
pub(crate) fn reconciled(agent: &Running, container: &str) {
    eventually(&format!("{container} is reconciled"), || {
        let finished = |e: &Value| e["container"] == container && e["completion"].is_string();
        if agent.entries().iter().any(finished) { Ok(()) } else { Err(agent.log()) }
    });
}
