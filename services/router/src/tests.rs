//! The router between a real client and scripted stages, all in this process and on loopback.

mod bad_input;
mod caching;
mod failover;
mod failures;
mod flows;
mod load;
mod mocks;
mod priorities;
mod redis_kinds;
mod redis_server;
mod regressing;
mod sandbox;
mod single_flight;
