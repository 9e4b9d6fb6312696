//! How a message becomes the bytes of a stream: as prost writes it, into room that is taken at once. prost's own codec
//! for tonic lets the buffer grow field by field, so that whatever follows a tensor moves all of it to a larger place.

use std::marker::PhantomData;

use prost::Message;
use tonic::{
    Status,
    codec::{BufferSettings, EncodeBuf, Encoder},
};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// The codec of every call of the generated code (`build.rs`).
#[derive(Clone, Debug)]
pub struct Codec<Out, In>(PhantomData<(Out, In)>);

impl<Out, In> Default for Codec<Out, In> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<Out, In> tonic::codec::Codec for Codec<Out, In>
where
    Out: Message + Send + 'static,
    In: Message + Default + Send + 'static,
{
    type Encode = Out;
    type Decode = In;
    type Encoder = AtOnce<Out>;
    type Decoder = ProstDecoder<In>;

    fn encoder(&mut self) -> AtOnce<Out> {
        AtOnce(ProstEncoder::default())
    }

    fn decoder(&mut self) -> ProstDecoder<In> {
        ProstDecoder::default()
    }
}

/// An encoder that takes the room of a whole message before it writes the first field.
#[derive(Clone, Debug)]
pub struct AtOnce<Out>(ProstEncoder<Out>);

impl<Out: Message> Encoder for AtOnce<Out> {
    type Item = Out;
    type Error = Status;

    fn encode(&mut self, message: Out, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(message.encoded_len());
        self.0.encode(message, buffer)
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}
