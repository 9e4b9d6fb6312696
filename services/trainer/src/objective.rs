//! What is minimised: an objective for each kind of stage, with its section of the stage's file, its batches and its
//! loss. All run on the services' own models.
//!
//! | module | trains | paper |
//! |---|---|---|
//! | [`naming`] | the tower: what stands where, on what background, how many; in place of the paper's CLIP | – |
//! | [`next_element`] | the llm: the next token, or the next embedding of an image | 2.1, 2.2.2 |
//! | [`autoencode`] | the VAE | latent diffusion, arXiv 2112.10752 |
//! | [`denoise`] | the UNet, given the frozen tower's embeddings | 2.2.3 |
//! | [`illustrate`] | the UNet, given what the llm predicts of them | – |
//! | [`interface`], [`loss`] | what the training loop asks of an objective, and what it gets | |
//! | [`documents`], [`images`] | the batches that several objectives share | |
//! | [`llm_pass`] | the llm's forward pass: teacher forcing, scheduled sampling, blind | |

pub mod autoencode;
mod bounds;
pub mod denoise;
pub mod documents;
pub mod illustrate;
pub mod images;
pub mod interface;
pub mod llm_pass;
pub mod loss;
pub mod naming;
pub mod next_element;
mod random;
