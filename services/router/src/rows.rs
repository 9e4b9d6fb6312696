//! Rows of embeddings as the llm regresses them, put together as they come.

use bytes::BytesMut;
use emu2_proto::{stage::RegressedEmbeddings, v1};
use emu2_serve::status;
use tonic::Status;

use crate::cache::is_whole;

#[derive(Debug, Default)]
pub(crate) struct Rows {
    dtype: i32,
    width: u32,
    rows: u32,
    data: BytesMut,
}

impl Rows {
    pub(crate) fn is_empty(&self) -> bool {
        self.rows == 0
    }

    pub(crate) fn push(&mut self, more: &RegressedEmbeddings) -> Result<(), Status> {
        let tensor = more.embeddings.as_ref().filter(|tensor| is_whole(tensor)).ok_or_else(malformed)?;
        let &[rows, width] = tensor.shape.as_slice() else { return Err(malformed()) };
        if self.rows == 0 {
            (self.dtype, self.width) = (tensor.dtype, width);
        }
        if more.start != self.rows || (tensor.dtype, width) != (self.dtype, self.width) {
            return Err(malformed());
        }
        self.rows += rows;
        self.data.extend_from_slice(&tensor.data);
        Ok(())
    }

    /// What there is; none if there is nothing.
    pub(crate) fn so_far(&self) -> Option<v1::Tensor> {
        (!self.is_empty()).then(|| v1::Tensor {
            dtype: self.dtype,
            shape: vec![self.rows, self.width],
            data: self.data.clone().freeze(),
        })
    }

    /// All of them, if there are as many as expected.
    pub(crate) fn whole(&self, expected: u32) -> Result<v1::Tensor, Status> {
        self.so_far().filter(|_| self.rows == expected).ok_or_else(malformed)
    }
}

fn malformed() -> Status {
    status::internal("the llm sent rows that do not make up an image")
}
