//! Authentication and authorization of HTTP clients by the API server: a TokenReview for the bearer
//! token of a request, and a SubjectAccessReview for its path. Needs `create` on both.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use k8s_openapi::{
    api::{
        authentication::v1::{TokenReview, TokenReviewSpec},
        authorization::v1::{
            NonResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
            SubjectAccessReviewStatus,
        },
    },
    serde::{Serialize, de::DeserializeOwned},
};
use kube::{Client, Resource, api::PostParams};
use ring::digest::{self, SHA256};
use tokio::sync::Semaphore;

use super::unavailable;
use crate::telemetry::OutageLog;

/// The deadline of the reviews for one request, with the time that it waits for others.
const DEADLINE: Duration = Duration::from_secs(5);
/// The limit of requests that are reviewed at a time.
const MAX_REVIEWS: usize = 4;
/// The shortest time for which a review counts as one at a time: the API server gets those of at
/// most 40 requests per second.
const PACE: Duration = Duration::from_millis(100);
/// A decision is used again for this time, so that one that changes takes effect within it.
const CACHE_TTL: Duration = Duration::from_secs(10);
/// The limit of decisions in the cache: more than are made within [`CACHE_TTL`].
const MAX_CACHED: usize = 512;
/// A longer token is refused without a review. Those of service accounts have about 1 KiB.
const MAX_TOKEN_BYTES: usize = 16 << 10;

const NO_TOKEN: &str =
    "no bearer token; send the header 'Authorization: Bearer TOKEN', with kubectl create token\n";
const INVALID_TOKEN: &str =
    "the API server does not accept this token; get another one with kubectl create token\n";
const UNAVAILABLE: &str =
    "the API server has not reviewed the token; retry, and see the agent's log for the reason";

/// What the API server says about a token and a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    Allowed,
    /// The token is not valid.
    Unauthenticated,
    /// The token's user may not get the path.
    Forbidden,
}

/// Why there is no decision.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("timed out after {} s", DEADLINE.as_secs())]
    Timeout,
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Request(kube::Error),
    #[error("the response has no user")]
    NoUser,
}

impl From<kube::Error> for Error {
    /// Without the type's own words around the message of the API server.
    fn from(error: kube::Error) -> Error {
        match error {
            kube::Error::Api(status) if !status.message.is_empty() => {
                Error::Refused(status.message)
            }
            error => Error::Request(error),
        }
    }
}

/// A hash of a token and a path. The token itself is not kept.
type Key = [u8; 32];

/// Reviews requests, few at a time, and keeps the decisions for a short time.
pub(super) struct Reviewer {
    client: Client,
    running: Arc<Semaphore>,
    cache: Mutex<HashMap<Key, (Instant, Decision)>>,
    outage: Mutex<OutageLog>,
}

/// Passes requests on that the API server allows, and responds to the others.
pub(super) async fn authorize(
    State(reviewer): State<Arc<Reviewer>>,
    request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    let decision = match bearer_token(request.headers()) {
        Some(token) if token.len() > MAX_TOKEN_BYTES => Ok(Decision::Unauthenticated),
        Some(token) => reviewer.decide(token, path).await,
        None => return unauthorized(NO_TOKEN),
    };
    match decision {
        Ok(Decision::Allowed) => next.run(request).await,
        Ok(Decision::Unauthenticated) => unauthorized(INVALID_TOKEN),
        Ok(Decision::Forbidden) => (StatusCode::FORBIDDEN, forbidden(path)).into_response(),
        Err(_) => unavailable(UNAVAILABLE),
    }
}

/// The token of the header `Authorization`. The name of the scheme is case-insensitive (RFC 9110).
fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

fn unauthorized(why: &'static str) -> Response {
    (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], why).into_response()
}

fn forbidden(path: &str) -> String {
    format!(
        "the user of this token may not get {path}; \
         bind a ClusterRole with nonResourceURLs: [{path}] and verbs: [get]\n"
    )
}

impl Reviewer {
    pub(super) fn new(client: Client) -> Reviewer {
        Reviewer {
            client,
            running: Arc::new(Semaphore::new(MAX_REVIEWS)),
            cache: Mutex::default(),
            outage: Mutex::new(OutageLog::new("token reviews")),
        }
    }

    /// The decision of the cache, or of the API server.
    async fn decide(&self, token: &str, path: &str) -> Result<Decision, Error> {
        let key = key(token, path);
        if let Some(decision) = self.cached(&key) {
            return Ok(decision);
        }
        let review = tokio::time::timeout(DEADLINE, self.review(key, token, path)).await;
        let decision = review.unwrap_or(Err(Error::Timeout));
        let mut outage = lock(&self.outage);
        match &decision {
            Ok(_) => outage.recovered("the API server reviews tokens again"),
            Err(cause) => outage.failed("failed to review a token", cause),
        }
        decision
    }

    /// Reviews when it is this request's turn, unless another one had the same review.
    async fn review(&self, key: Key, token: &str, path: &str) -> Result<Decision, Error> {
        let turn = self.running.clone().acquire_owned().await.expect("it is never closed");
        if let Some(decision) = self.cached(&key) {
            return Ok(decision);
        }
        // The turn ends with the later of the two: also a client that closes its connection, which
        // ends its review, delays the next one.
        let turn = Arc::new(turn);
        let paced = turn.clone();
        tokio::spawn(async move {
            tokio::time::sleep(PACE).await;
            drop(paced);
        });
        let decision = self.request_reviews(token, path).await?;
        self.keep(key, decision);
        Ok(decision)
    }

    async fn request_reviews(&self, token: &str, path: &str) -> Result<Decision, Error> {
        let spec = TokenReviewSpec { token: token.to_owned(), ..Default::default() };
        let review = self.create(&TokenReview { spec, ..Default::default() }).await?;
        let status = review.status.unwrap_or_default();
        if status.authenticated != Some(true) {
            return Ok(Decision::Unauthenticated);
        }
        let user = status.user.ok_or(Error::NoUser)?;
        let spec = SubjectAccessReviewSpec {
            user: user.username,
            uid: user.uid,
            groups: user.groups,
            extra: user.extra,
            non_resource_attributes: Some(NonResourceAttributes {
                path: Some(path.to_owned()),
                verb: Some("get".to_owned()),
            }),
            ..Default::default()
        };
        let review = self.create(&SubjectAccessReview { spec, ..Default::default() }).await?;
        match review.status {
            Some(SubjectAccessReviewStatus {
                allowed: true, denied: None | Some(false), ..
            }) => Ok(Decision::Allowed),
            _ => Ok(Decision::Forbidden),
        }
    }

    /// Creates a review, and returns it with its status. `Client::request` would log a response
    /// that it does not understand, with the token in it.
    async fn create<R>(&self, review: &R) -> Result<R, kube::Error>
    where
        R: Resource<DynamicType = ()> + Serialize + DeserializeOwned,
    {
        let body = serde_json::to_vec(review).map_err(kube::Error::SerdeError)?;
        let request = kube::core::Request::new(R::url_path(&(), None))
            .create(&PostParams::default(), body)
            .map_err(kube::Error::BuildRequest)?;
        let text = self.client.request_text(request).await?;
        serde_json::from_str(&text).map_err(kube::Error::SerdeError)
    }

    fn cached(&self, key: &Key) -> Option<Decision> {
        let cache = lock(&self.cache);
        let (at, decision) = cache.get(key)?;
        (at.elapsed() < CACHE_TTL).then_some(*decision)
    }

    fn keep(&self, key: Key, decision: Decision) {
        let mut cache = lock(&self.cache);
        cache.retain(|_, (at, _)| at.elapsed() < CACHE_TTL);
        if cache.len() < MAX_CACHED {
            cache.insert(key, (Instant::now(), decision));
        }
    }
}

fn key(token: &str, path: &str) -> Key {
    let mut hash = digest::Context::new(&SHA256);
    hash.update(path.as_bytes());
    hash.update(b" ");
    hash.update(token.as_bytes());
    hash.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        convert::Infallible,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;

    /// A client of an API server that responds with the status of each review.
    fn client<F, R>(respond: F) -> Client
    where
        F: Fn(Value) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Option<Value>> + Send,
    {
        let service = tower::service_fn(move |request: axum::http::Request<Body>| {
            let respond = respond.clone();
            async move {
                let body = request.into_body().collect_bytes().await.unwrap();
                let mut review: Value = serde_json::from_slice(&body).unwrap();
                let response = axum::http::Response::builder();
                let response = match respond(review.clone()).await {
                    Some(status) => {
                        review["status"] = status;
                        response.status(201).body(Body::from(review.to_string().into_bytes()))
                    }
                    None => response.status(500).body(Body::empty()),
                };
                Ok::<_, Infallible>(response.unwrap())
            }
        });
        Client::new(service, "default")
    }

    /// The API server's decisions: `good` may get `/status`, `down` fails, others are not valid.
    fn status_of(review: &Value) -> Option<Value> {
        let user = json!({"username": "u", "uid": "1", "groups": ["g"], "extra": {"k": ["v"]}});
        match (&review["kind"], review["spec"]["token"].as_str()) {
            (_, Some("good")) => Some(json!({"authenticated": true, "user": user})),
            (_, Some("down")) => None,
            (_, Some(_)) => Some(json!({"authenticated": false})),
            _ => {
                let mut spec = user;
                let path = review["spec"]["nonResourceAttributes"]["path"].clone();
                spec["user"] = spec["username"].take();
                spec.as_object_mut().unwrap().remove("username");
                spec["nonResourceAttributes"] = json!({"path": path, "verb": "get"});
                assert_eq!(review["spec"], spec);
                Some(json!({"allowed": path == "/status"}))
            }
        }
    }

    #[tokio::test]
    async fn decisions_are_kept_without_the_token() {
        let requests = Arc::new(AtomicUsize::new(0));
        let counter = requests.clone();
        let reviewer = Reviewer::new(client(move |review| {
            counter.fetch_add(1, Ordering::Relaxed);
            std::future::ready(status_of(&review))
        }));
        for (token, path, expected, expected_requests) in [
            ("good", "/status", Some(Decision::Allowed), 2),
            ("good", "/status", Some(Decision::Allowed), 0),
            ("good", "/metrics", Some(Decision::Forbidden), 2),
            ("good", "/metrics", Some(Decision::Forbidden), 0),
            ("bad", "/status", Some(Decision::Unauthenticated), 1),
            ("bad", "/status", Some(Decision::Unauthenticated), 0),
            ("down", "/status", None, 1),
            ("down", "/status", None, 1),
        ] {
            let before = requests.load(Ordering::Relaxed);
            assert_eq!(reviewer.decide(token, path).await.ok(), expected, "{token} {path}");
            let sent = requests.load(Ordering::Relaxed) - before;
            assert_eq!(sent, expected_requests, "{token} {path}");
        }
        assert_eq!(lock(&reviewer.cache).len(), 3);
    }

    #[tokio::test]
    async fn few_reviews_run_at_a_time() {
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (seen, started) = (most.clone(), running.clone());
        let reviewer = Arc::new(Reviewer::new(client(move |review| {
            seen.fetch_max(started.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            let started = started.clone();
            async move {
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
                started.fetch_sub(1, Ordering::Relaxed);
                status_of(&review)
            }
        })));
        let mut clients = tokio::task::JoinSet::new();
        for n in 0..3 * MAX_REVIEWS {
            let reviewer = reviewer.clone();
            clients.spawn(async move { reviewer.decide(&n.to_string(), "/status").await.ok() });
        }
        clients.join_all().await;
        assert_eq!(most.load(Ordering::Relaxed), MAX_REVIEWS);
    }

    #[test]
    fn key_depends_on_token_and_path() {
        let keys = [("a", "/b"), ("b", "/b"), ("a", "/c"), ("a /b", "")];
        let keys: HashSet<Key> = keys.into_iter().map(|(token, path)| key(token, path)).collect();
        assert_eq!(keys.len(), 4);
    }

    #[test]
    fn bearer_token_follows_its_scheme() {
        for (value, expected) in [
            ("Bearer a.b-c", Some("a.b-c")),
            ("bearer  a ", Some("a")),
            ("Bearer ", None),
            ("Bearer", None),
            ("Basic a", None),
            ("a", None),
        ] {
            let headers = HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
            assert_eq!(bearer_token(&headers), expected, "{value}");
        }
        assert_eq!(bearer_token(&HeaderMap::new()), None);
    }
}
