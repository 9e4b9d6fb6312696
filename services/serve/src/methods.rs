//! What the contracts say of each RPC, read from their descriptors.

use std::collections::HashMap;

use prost::{DecodeError, Message};
use prost_types::{FileDescriptorProto, FileDescriptorSet};

/// Every RPC of the contracts by `package.Service/Method`.
pub(crate) struct Methods(HashMap<String, Method>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Method {
    /// Its request has no fields: a question about the service, answered from what it knows.
    pub(crate) asks_nothing: bool,
    /// Its request is a stream, whose messages are read one at a time.
    pub(crate) streams_in: bool,
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
                    };
                    (format!("{name}/{}", method.name()), shape)
                })
            })
        });
        Ok(Self(methods.collect()))
    }

    /// None: callers choose paths.
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
    fn questions_and_streams_are_told_apart() {
        let methods = Methods::read().unwrap();
        let shape = |asks_nothing, streams_in| Some(Method { asks_nothing, streams_in });
        assert_eq!(methods.get("emu2.v1.Emu2/ListModels"), shape(true, false));
        assert_eq!(methods.get("emu2.v1.Emu2/Generate"), shape(false, false));
        assert_eq!(methods.get("emu2.stage.v1.LanguageModel/Info"), shape(true, false));
        assert_eq!(methods.get("emu2.stage.v1.LanguageModel/Generate"), shape(false, true));
        assert_eq!(methods.get("emu2.v1.Emu2/Anything"), None);
    }
}
