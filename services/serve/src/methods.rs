//! What the contracts say of each RPC, read from their descriptors.

use std::collections::HashMap;

use prost::{DecodeError, Message};
use prost_types::{FileDescriptorProto, FileDescriptorSet};

/// The RPCs of the contracts, by `package.Service/Method`.
pub(crate) struct Methods(HashMap<String, Method>);

/// What the layer around an RPC needs to know of its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Method {
    /// Its request has no fields: a question about the service, answered from what it knows.
    pub(crate) asks_nothing: bool,
    /// Its request is a stream, whose messages are read one at a time.
    pub(crate) streams_in: bool,
    /// Its answer is a stream.
    pub(crate) streams_out: bool,
}

impl Method {
    /// Whether it tells changes of the service to whoever asks, and never ends by itself.
    pub(crate) fn is_watch(self) -> bool {
        self.asks_nothing && self.streams_out
    }
}

impl Methods {
    pub(crate) fn read() -> Result<Self, DecodeError> {
        let descriptors = FileDescriptorSet::decode(emu2_proto::DESCRIPTORS)?;
        let fields: HashMap<_, _> = descriptors.file.iter().flat_map(message_fields).collect();
        let methods = descriptors.file.iter().flat_map(|file| {
            let fields = &fields;
            file.service.iter().flat_map(move |service| {
                let name = format!("{}.{}", file.package(), service.name());
                service.method.iter().map(move |method| {
                    let shape = Method {
                        asks_nothing: fields.get(method.input_type()) == Some(&0),
                        streams_in: method.client_streaming(),
                        streams_out: method.server_streaming(),
                    };
                    (format!("{name}/{}", method.name()), shape)
                })
            })
        });
        Ok(Self(methods.collect()))
    }

    /// Returns what is known of a method; `None` for what no contract has, because callers choose paths.
    pub(crate) fn get(&self, method: &str) -> Option<Method> {
        self.0.get(method).copied()
    }
}

/// Fully qualified names, as methods refer to them, and how many fields each has.
fn message_fields(file: &FileDescriptorProto) -> impl Iterator<Item = (String, usize)> {
    let message = |message: &prost_types::DescriptorProto| {
        (format!(".{}.{}", file.package(), message.name()), message.field.len())
    };
    file.message_type.iter().map(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_streams_and_watches_are_told_apart() {
        let methods = Methods::read().unwrap();
        let shape =
            |asks_nothing, streams_in, streams_out| Some(Method { asks_nothing, streams_in, streams_out });
        assert_eq!(methods.get("emu2.v1.Emu2/ListModels"), shape(true, false, false));
        assert_eq!(methods.get("emu2.v1.Emu2/Generate"), shape(false, false, true));
        assert_eq!(methods.get("emu2.stage.v1.LanguageModel/Info"), shape(true, false, false));
        assert_eq!(methods.get("emu2.stage.v1.LanguageModel/Generate"), shape(false, true, true));
        assert_eq!(methods.get("emu2.v1.Emu2/Anything"), None);
        let watches = |method| methods.get(method).unwrap().is_watch();
        assert!(watches("emu2.stage.v1.VisualDecoder/WatchLoad"));
        assert!(!watches("emu2.v1.Emu2/Generate") && !watches("emu2.stage.v1.VisualDecoder/Info"));
    }
}
