//! Whole clusters on small models, through their gRPC: one file a behaviour.
//!
//! | file | behaviour |
//! |---|---|
//! | `abilities.rs` | what the model that ships can do |
//! | `api.rs` | what a client finds: models, limits, events in order, reflection, health |
//! | `bad_input.rs` | every bad request has its code and a message with field, limit and value |
//! | `cache.rs` | an image is encoded once, whoever asks |
//! | `cancel.rs` | a client that leaves, or whose time is up, frees every stage |
//! | `client.rs` | the command `emu2`: starts without libtorch, lists models, has one help for all commands |
//! | `convert.rs` | a published pickle, converted, is the same model |
//! | `invariants.rs` | the architecture's rules, read from the sources |
//! | `layouts.rs` | the same weights in another published layout are the same model |
//! | `metrics.rs` | every metric names its part of the system and its unit |
//! | `models.rs` | several models: what they share, and what each refuses |
//! | `lifecycle.rs` | the real binaries: start, serve, SIGTERM |
//! | `parity.rs` | the official model's numbers, through the wire |
//! | `images.rs` | images of every kind are read as Pillow reads them |
//! | `trace.rs` | one request is one trace |

mod abilities;
mod api;
mod bad_input;
mod cache;
mod cancel;
mod client;
mod convert;
mod failover;
mod images;
mod invariants;
mod layouts;
mod lifecycle;
mod metrics;
mod models;
mod parity;
mod processes;
mod support;
mod trace;
