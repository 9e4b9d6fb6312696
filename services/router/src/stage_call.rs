//! A call of a stage that outlives its replicas. What the call sends is kept, and what it has been answered; when its
//! replica is lost, hangs, or is full, the next one is sent the same and goes on from there, so that whoever reads
//! sees one unbroken row of answers.
//!
//! ```text
//! inputs ─▶ kept ─▶ attempt n (one replica's stream) ─▶ Call::take ─▶ answers, each once
//!                └▶ attempt n + 1, from Call::first with all that was answered
//! ```
//!
//! Attempts are numbered. There is one at a time: an older one's stream is dropped before the next begins, so that
//! nothing which a hung replica says after waking is ever read, and the replica finds the call cancelled.

use std::{sync::Arc, time::Duration};

use emu2_serve::{deadline::Deadline, priority::Priority, status, trace};
use futures::future::OptionFuture;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming, metadata::MetadataMap};

use crate::{
    error::{self, Stop},
    metrics::{Metrics, StageTimer},
    pool::{Lease, NoReplica, Pool, Stage, Wanted},
};

/// Messages that wait for a stage to take them: one on its way and one ready; more would only be held here.
const WAITING_MESSAGES: usize = 2;
/// Pauses between two tries: the first is short, since another replica is most likely well; they double, and are
/// drawn between nothing and twice their length, so that the callers of a lost replica do not come in step.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);
/// How long a call that has been answered waits while every replica refuses connections: long enough for a replica that
/// is being added to become known, short enough that the client hears within two seconds.
const REFUSED_WAIT: Duration = Duration::from_millis(1400);
/// When a client may ask again after all replicas were lost: about when each has been asked anew.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// A stage ends its stream right after its last answer.
const END_TIMEOUT: Duration = Duration::from_millis(100);
/// The metadata key of an attempt's number, for logs and traces: 1 for the first.
const ATTEMPT: &str = "x-emu2-attempt";

/// What is asked of a stage, and what has been answered.
pub(crate) trait Call: Send {
    type Stage: Stage;
    type In: Clone + Send + 'static;
    type Out: Send + 'static;

    /// The first message of an attempt: it goes on after all that was taken.
    fn first(&self) -> Self::In;

    fn open(
        client: <Self::Stage as Stage>::Client,
        request: Request<ReceiverStream<Self::In>>,
    ) -> impl Future<Output = Result<Response<Streaming<Self::Out>>, Status>> + Send;

    /// Notes an answer, and says what it is worth.
    fn take(&mut self, answer: &Self::Out) -> Result<Progress, Status>;
}

/// What an answer is to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    New,
    /// New, and nothing comes after it.
    Last,
    /// The reader has had it from an earlier attempt.
    Known,
    /// It shows that the replica has other weights than the call began with.
    OtherWeights,
}

/// Where and for how long a call goes.
#[derive(Clone)]
pub(crate) struct Route<S: Stage> {
    pub(crate) pool: Arc<Pool<S>>,
    pub(crate) digest: String,
    pub(crate) hint: Option<u64>,
    pub(crate) deadline: Deadline,
    pub(crate) priority: Priority,
    pub(crate) metrics: Metrics,
}

/// The reading half of a call; dropping it stops the stage. It opens its first stream when first read.
pub(crate) struct Session<C: Call> {
    call: C,
    route: Route<C::Stage>,
    inputs: mpsc::Receiver<C::In>,
    kept: Vec<C::In>,
    /// No more inputs will come.
    complete: bool,
    attempt: Option<Attempt<C>>,
    /// The last answer has come.
    ended: bool,
    /// Who gave it.
    ended_by: Option<Lease<C::Stage>>,
    tries: Tries,
    _timer: StageTimer,
}

/// One replica's stream.
struct Attempt<C: Call> {
    /// Where messages go, until everything has been sent.
    requests: Option<mpsc::Sender<C::In>>,
    sent: usize,
    answers: Streaming<C::Out>,
    lease: Lease<C::Stage>,
}

/// How a call has fared so far.
#[derive(Debug)]
struct Tries {
    /// Attempts begun.
    number: u32,
    /// Replicas that took the call since an answer last took it further.
    fruitless: u32,
    /// Whether any answer has come: then the caller has something to lose.
    answered: bool,
    /// Replicas that were lost or had no room since then.
    avoid: Vec<String>,
    /// What the last of them said.
    last: Option<Status>,
    /// When the first of them was lost.
    lost_since: Option<Instant>,
    pause: Duration,
}

impl Default for Tries {
    fn default() -> Self {
        Self {
            number: 0,
            fruitless: 0,
            answered: false,
            avoid: Vec::new(),
            last: None,
            lost_since: None,
            pause: FIRST_PAUSE,
        }
    }
}

/// Why an attempt ended before the call did.
#[derive(Debug)]
enum Loss {
    /// The replica is gone or leaving.
    Lost(Status),
    /// It does not get on with its work.
    Hung,
    /// It has no room.
    Full(Status),
    /// It has other weights than the call began with.
    WeightsChanged,
}

impl<C: Call> Session<C> {
    /// The call, and where its messages after the first go.
    pub(crate) fn new(call: C, route: Route<C::Stage>) -> (mpsc::Sender<C::In>, Self) {
        let (sender, inputs) = mpsc::channel(WAITING_MESSAGES);
        let session = Self {
            call,
            _timer: route.metrics.time(C::Stage::NAME),
            route,
            inputs,
            kept: Vec::new(),
            complete: false,
            attempt: None,
            ended: false,
            ended_by: None,
            tries: Tries::default(),
        };
        (sender, session)
    }

    /// The next answer that is new. A stage may end its stream only after its last answer, which the caller knows: an
    /// end before that is a fault.
    pub(crate) async fn next(&mut self) -> Result<C::Out, Stop> {
        loop {
            let mut attempt = match self.attempt.take() {
                Some(attempt) => attempt,
                None => self.begin().await?,
            };
            match self.turn(&mut attempt).await? {
                Ok(answer) => {
                    if self.ended {
                        self.ended_by = Some(attempt.end());
                    } else {
                        self.attempt = Some(attempt);
                    }
                    return Ok(answer);
                }
                Err(loss) => {
                    let Attempt { lease, requests, answers, .. } = attempt;
                    // Both halves: a stream is over only when neither is held.
                    drop((requests, answers));
                    self.lose(&lease, loss).await?;
                }
            }
        }
    }

    /// The call, with all that was answered, and the replica that gave its last answer.
    pub(crate) fn into_parts(self) -> (C, Option<Lease<C::Stage>>) {
        (self.call, self.ended_by)
    }

    /// Hands over what is to be sent until an answer comes.
    async fn turn(&mut self, attempt: &mut Attempt<C>) -> Result<Result<C::Out, Loss>, Stop> {
        loop {
            if self.complete && attempt.sent == self.kept.len() {
                attempt.requests = None;
            }
            let unsent = attempt.requests.clone().filter(|_| attempt.sent < self.kept.len());
            let room = OptionFuture::from(unsent.map(mpsc::Sender::reserve_owned));
            tokio::select! {
                biased;
                answer = attempt.answers.message() => match self.hear(answer, &attempt.lease)? {
                    Some(heard) => return Ok(heard),
                    None => continue,
                },
                Some(room) = room => match room {
                    Ok(room) => {
                        drop(room.send(self.kept[attempt.sent].clone()));
                        attempt.sent += 1;
                    }
                    // The stage has hung up: why is among its answers.
                    Err(_) => attempt.requests = None,
                },
                input = self.inputs.recv(), if !self.complete => match input {
                    Some(input) => self.kept.push(input),
                    None => self.complete = true,
                },
                () = attempt.lease.hung() => return Ok(Err(Loss::Hung)),
            }
        }
    }

    /// What came, if it is anything new.
    fn hear(
        &mut self,
        answer: Result<Option<C::Out>, Status>,
        lease: &Lease<C::Stage>,
    ) -> Result<Option<Result<C::Out, Loss>>, Stop> {
        match answer {
            Ok(Some(answer)) => match self.call.take(&answer)? {
                taken @ (Progress::New | Progress::Last) => {
                    self.ended = taken == Progress::Last;
                    self.tries = Tries { number: self.tries.number, answered: true, ..Tries::default() };
                    lease.record_outcome(true);
                    Ok(Some(Ok(answer)))
                }
                Progress::Known => Ok(None),
                Progress::OtherWeights => Ok(Some(Err(Loss::WeightsChanged))),
            },
            Ok(None) => {
                lease.record_outcome(false);
                Err(status::internal(format!("the {} stage ended before its result", C::Stage::NAME)).into())
            }
            Err(status) => Ok(Some(Err(Loss::of(status, lease)?))),
        }
    }

    /// A stream to a replica that has been sent the beginning.
    async fn begin(&mut self) -> Result<Attempt<C>, Stop> {
        loop {
            let lease = self.find().await?;
            self.tries.number += 1;
            let (requests, receiver) = mpsc::channel(WAITING_MESSAGES);
            let first = requests.try_send(self.call.first());
            debug_assert!(first.is_ok(), "an empty queue takes one message");
            // A call of one message says so with it, and its stage ends the stream with its answer.
            self.complete |= self.inputs.is_closed() && self.inputs.is_empty();
            let requests = (!self.complete || !self.kept.is_empty()).then_some(requests);
            let mut request = Request::new(ReceiverStream::new(receiver));
            carry(request.metadata_mut(), &self.route, self.tries.number);
            let opened = tokio::select! {
                opened = C::open(lease.client(), request) => opened,
                () = lease.hung() => {
                    self.lose(&lease, Loss::Hung).await?;
                    continue;
                }
            };
            self.tries.fruitless += u32::from(!opened.as_ref().is_err_and(error::never_arrived));
            match opened {
                Ok(answers) => {
                    return Ok(Attempt { requests, sent: 0, answers: answers.into_inner(), lease });
                }
                Err(status) => {
                    let loss = Loss::of(status, &lease)?;
                    self.lose(&lease, loss).await?;
                }
            }
        }
    }

    /// A replica for the next attempt. A call that has been answered nothing fails at once when there is none; one
    /// that has is worth a wait.
    async fn find(&mut self) -> Result<Lease<C::Stage>, Stop> {
        let patience = Duration::from_millis(self.route.pool.config().failover_wait_ms);
        loop {
            let lost_for = self.tries.lost_since.map_or(Duration::ZERO, |since| since.elapsed());
            if lost_for >= patience || (lost_for >= REFUSED_WAIT && self.route.pool.is_refused()) {
                return Err(self.last_word());
            }
            let Tries { number, avoid, .. } = &self.tries;
            let wanted = Wanted { digest: &self.route.digest, hint: self.route.hint, avoid };
            let found = match number {
                0 => self.route.pool.lease(wanted),
                _ => self.route.pool.lease_again(wanted),
            };
            match found {
                Ok(lease) => return Ok(lease),
                Err(NoReplica::WeightsChanged) => return Err(Stop::WeightsChanged),
                // Nothing is lost by beginning anew with the weights of the others.
                Err(NoReplica::Rolling) if self.tries.is_lost_unanswered() => {
                    return Err(Stop::WeightsChanged);
                }
                Err(NoReplica::Gone | NoReplica::Rolling) if self.tries.answered => {
                    self.tries.avoid.clear();
                    self.pause().await;
                }
                Err(NoReplica::Gone | NoReplica::Rolling | NoReplica::TooManyRetries) => {
                    return Err(self.last_word());
                }
            }
        }
    }

    /// Why no attempt is made any more.
    fn last_word(&mut self) -> Stop {
        let status = match self.tries.last.take() {
            None => {
                let stage = C::Stage::NAME;
                let text = format!("no {stage} replica with the request's weights is left");
                status::unavailable_for(text, RETRY_AFTER)
            }
            Some(full) if full.code() == Code::ResourceExhausted => full,
            Some(lost) => {
                let (how, answered) = (error::of_loss(C::Stage::NAME, &lost), self.tries.answered);
                let then =
                    if answered { "no other has gone on" } else { "nothing was answered yet, ask again" };
                status::unavailable_for(format!("{how}; {then}"), RETRY_AFTER)
            }
        };
        status.into()
    }

    /// Makes ready for the next attempt, or says why there is none.
    async fn lose(&mut self, lease: &Lease<C::Stage>, loss: Loss) -> Result<(), Stop> {
        let (stage, endpoint, attempt, reason) =
            (C::Stage::NAME, lease.endpoint(), self.tries.number, loss.name());
        self.route.metrics.attempt_lost(stage, reason);
        tracing::warn!(stage, endpoint, attempt, reason, "attempt lost");
        let ours = match &loss {
            Loss::Lost(_) | Loss::Hung => {
                lease.mark_suspect();
                lease.record_outcome(false);
                true
            }
            // What nobody has room for is shed, unless it has been begun.
            Loss::Full(_) => !self.tries.answered,
            Loss::WeightsChanged => {
                lease.refresh().await;
                false
            }
        };
        self.tries.lost_since.get_or_insert_with(Instant::now);
        // A replica that has seen nothing of the call comes last, as one that is doubted, but may be asked once more
        // over a new connection.
        if !matches!(&loss, Loss::Lost(status) if error::was_never_sent(status)) {
            self.tries.avoid.push(endpoint.to_owned());
        }
        self.tries.last = loss.status::<C::Stage>();
        // A call that itself is what kills replicas must not take the whole pool with it.
        if ours && self.tries.fruitless >= self.route.pool.config().max_attempts {
            return Err(self.last_word());
        }
        if self.tries.answered || self.tries.fruitless > 1 {
            self.pause().await;
        }
        Ok(())
    }

    async fn pause(&mut self) {
        sleep(self.tries.pause.mul_f64(rand::random_range(0.0..2.0))).await;
        self.tries.pause = (self.tries.pause * 2).min(LONGEST_PAUSE);
    }
}

impl Tries {
    /// Whether a replica was lost before it answered anything. One without room is not lost.
    fn is_lost_unanswered(&self) -> bool {
        let full = self.last.as_ref().is_some_and(|status| status.code() == Code::ResourceExhausted);
        !self.answered && !full
    }
}

impl<C: Call> Attempt<C> {
    /// Reads the stream's own end after the last answer, beside whoever has that answer by now. A stream that is
    /// dropped before it has ended is reset, and HTTP/2 takes a connection with many of those for an attack.
    fn end(self) -> Lease<C::Stage> {
        let Self { requests, mut answers, lease, .. } = self;
        drop(requests);
        tokio::spawn(timeout(END_TIMEOUT, async move {
            // Whatever it ends with: the call has its answer.
            while let Ok(Some(_)) = answers.message().await {}
        }));
        lease
    }
}

impl Loss {
    /// Why an attempt ended, or what the stage says to the call itself.
    fn of<S: Stage>(status: Status, lease: &Lease<S>) -> Result<Self, Stop> {
        if error::is_replica_lost(&status) {
            return Ok(Self::Lost(status));
        }
        if status.code() == Code::ResourceExhausted {
            return Ok(Self::Full(status));
        }
        lease.record_outcome(status.code() != Code::Internal);
        Err(status.into())
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Lost(status) => error::loss_name(status),
            Self::Hung => "hung",
            Self::Full(_) => "full",
            Self::WeightsChanged => "rolled",
        }
    }

    fn status<S: Stage>(self) -> Option<Status> {
        match self {
            Self::Lost(status) | Self::Full(status) => Some(status),
            Self::Hung => Some(status::unavailable(format!("the {} replica hangs", S::NAME))),
            Self::WeightsChanged => None,
        }
    }
}

/// What every call carries: its trace, what is left of its time, its class, and which attempt it is.
fn carry<S: Stage>(metadata: &mut MetadataMap, route: &Route<S>, attempt: u32) {
    trace::inject(metadata);
    route.deadline.apply(metadata);
    route.priority.apply(metadata);
    metadata.insert(ATTEMPT, attempt.into());
}
