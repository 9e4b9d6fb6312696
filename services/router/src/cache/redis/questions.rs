//! What Redis is asked. Each question is one round trip and one atomic step: between a look at the value and the
//! taking of its lease nothing can happen. Value and lease of a key lie on one node of a Cluster, by the braces.

use std::time::Duration;

use bytes::Bytes;
use redis::{Cmd, FromRedisValue, ParsingError, Value};

use crate::cache::key::Key;

/// Names the holder of a lease: random, so that nobody ends another's.
pub(super) type Token = [u8; 16];

/// KEYS: value, lease. ARGV: token (empty: take no lease), milliseconds of a lease, most bytes of a value, whether the
/// value is to be dropped first. A Redis that is full gives no lease, but still its values.
const CLAIM: &str = "
if ARGV[4] == '1' then redis.call('DEL', KEYS[1]) end
local bytes = redis.call('STRLEN', KEYS[1])
if bytes > tonumber(ARGV[3]) then return 3 end
if bytes > 0 then return redis.call('GET', KEYS[1]) end
if ARGV[1] == '' then return 2 end
local taken = redis.pcall('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2])
if not taken then return 0 end
if taken.ok then return 1 end
if string.find(taken.err, 'OOM', 1, true) then return 2 end
return taken";

/// KEYS: lease. ARGV: token, milliseconds. A lease that Redis has lost is taken again; one that has become another's
/// is left alone.
const RENEW: &str = "
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1";

/// KEYS: lease. ARGV: token.
const RELEASE: &str = "
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0";

/// KEYS: value, lease. ARGV: token (empty: there is no lease), value, milliseconds to keep it. The lease goes even
/// where Redis is full, which is no failure: the next miss computes again.
const PUBLISH: &str = "
local stored = redis.pcall('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
if stored.err and string.find(stored.err, 'OOM', 1, true) then return 0 end
return stored";

/// What Redis said of a key.
#[derive(Debug, PartialEq)]
pub(crate) enum LookupReply {
    /// What lies under it, not yet checked.
    Value(Bytes),
    /// It is not there, and the lease is the asker's.
    Leased,
    /// It is not there, and another holds the lease.
    Busy,
    /// It is not there, and no lease was asked for, or Redis is full.
    Nothing,
    /// What lies under it is larger than any value.
    TooLarge,
}

impl FromRedisValue for LookupReply {
    fn from_redis_value_ref(value: &Value) -> Result<Self, ParsingError> {
        Self::from_redis_value(value.clone())
    }

    fn from_redis_value(value: Value) -> Result<Self, ParsingError> {
        match value {
            Value::BulkString(bytes) => Ok(Self::Value(bytes.into())),
            Value::Int(0) => Ok(Self::Busy),
            Value::Int(1) => Ok(Self::Leased),
            Value::Int(2) => Ok(Self::Nothing),
            Value::Int(3) => Ok(Self::TooLarge),
            _ => Err("not an answer of this script".into()),
        }
    }
}

/// How a look for a key goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look<'a> {
    /// Who takes the lease where there is no value; empty: nobody.
    pub(crate) token: &'a [u8],
    pub(crate) lease: Duration,
    pub(crate) max_value_bytes: usize,
    /// What lies there was found bad.
    pub(crate) discards: bool,
}

pub(crate) fn look(key: &Key, look: Look<'_>) -> Cmd {
    let mut question = script(CLAIM, &[value_name(key), lease_name(key)]);
    question.arg(look.token).arg(millis(look.lease)).arg(look.max_value_bytes).arg(u8::from(look.discards));
    question
}

pub(crate) fn renew(key: &Key, token: &[u8], lease: Duration) -> Cmd {
    let mut question = script(RENEW, &[lease_name(key)]);
    question.arg(token).arg(millis(lease));
    question
}

pub(crate) fn release(key: &Key, token: &[u8]) -> Cmd {
    let mut question = script(RELEASE, &[lease_name(key)]);
    question.arg(token);
    question
}

pub(crate) fn publish(key: &Key, token: &[u8], value: &[u8], ttl: Duration) -> Cmd {
    let mut question = script(PUBLISH, &[value_name(key), lease_name(key)]);
    question.arg(token).arg(value).arg(millis(ttl));
    question
}

/// The script itself and not its digest: it is short, and no server has to have met it before.
fn script(text: &str, keys: &[String]) -> Cmd {
    let mut question = redis::cmd("EVAL");
    question.arg(text.trim_start()).arg(keys.len()).arg(keys);
    question
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

fn value_name(key: &Key) -> String {
    format!("emu2:embeddings:{{{key}}}")
}

fn lease_name(key: &Key) -> String {
    format!("emu2:lease:{{{key}}}")
}
