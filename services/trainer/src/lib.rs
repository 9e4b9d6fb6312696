//! Trains a small Emu2 ("nano") with the paper's objective, from data that anyone can get, and measures what it can.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | the command line |
//! | [`data`] | drawings → scenes → documents, endless and seeded; no torch |
//! | [`documents`] | documents on a contact sheet, for who wants to see the data |
//! | [`stage`] | one stage of training, as its file says |
//! | [`objective`] | what is minimised: each objective's configuration, batches and loss |
//! | [`samples`] | training samples by number |
//! | [`layout`], [`pixels`] | samples as the models read them |
//! | [`model`] | all parts of Emu2 over one store of variables: the services' own code |
//! | [`optimizer`] | AdamW, the learning rate's course, running averages |
//! | [`train`] | a stage at work |
//! | [`checkpoint`], [`log`] | what is kept of it, and how it goes |
//! | [`export`] | what has been trained, as a folder that the services load |
//! | [`tour`] | what `emu2 demo` shows of it |
//! | [`eval`], [`judge`] | what a served model can do; what an image shows |

pub mod args;
pub mod checkpoint;
pub mod data;
pub mod documents;
pub mod eval;
pub mod export;
pub mod judge;
pub mod layout;
pub mod log;
pub mod model;
pub mod objective;
pub mod optimizer;
pub mod pixels;
pub mod samples;
pub mod stage;
pub mod tour;
pub mod train;
