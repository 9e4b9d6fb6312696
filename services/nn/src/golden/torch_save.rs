//! Files as torch.save writes them, made by hand: the same opcodes in the same zip, for tests of published checkpoints.

use safetensors::{Dtype, SafeTensors};

/// One tensor of a state dict, alone in its storage.
#[derive(Debug)]
pub struct Saved {
    /// The tensor's name in the state dict.
    pub name: String,
    /// Torch's class of the storage, which tells the dtype, such as `FloatStorage`.
    pub class: &'static str,
    /// The tensor's sides.
    pub shape: Vec<usize>,
    /// The tensor's values in row-major order, little-endian.
    pub data: Vec<u8>,
}

impl Saved {
    /// Makes a tensor of float32 values in row-major order.
    ///
    /// # Panics
    ///
    /// The shape has another number of values.
    pub fn f32s(name: &str, shape: &[usize], values: impl IntoIterator<Item = f32>) -> Self {
        let data: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        assert_eq!(data.len(), shape.iter().product::<usize>() * 4);
        Self { name: name.to_owned(), class: "FloatStorage", shape: shape.to_vec(), data }
    }
}

/// Reads all tensors of a safetensors file, sorted by name, and converts them to float32.
///
/// # Panics
///
/// The bytes are no safetensors file, or hold anything but float32 and bfloat16.
pub fn widened(bytes: &[u8]) -> Vec<Saved> {
    let file = SafeTensors::deserialize(bytes).expect("a safetensors file");
    let mut tensors = file.tensors();
    tensors.sort_by(|(one, _), (other, _)| one.cmp(other));
    let saved = tensors.into_iter().map(|(name, view)| {
        let values: Vec<f32> = match view.dtype() {
            Dtype::F32 => view.data().as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect(),
            Dtype::BF16 => view.data().as_chunks().0.iter().map(|value| widen(*value)).collect(),
            other => panic!("{name} is {other:?}"),
        };
        Saved::f32s(&name, view.shape(), values)
    });
    saved.collect()
}

/// Converts a bfloat16 to float32, exactly: it is the upper half of one.
fn widen(value: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(value)) << 16)
}

/// Writes a state dict of these tensors as torch.save writes it.
pub fn save(tensors: &[Saved]) -> Vec<u8> {
    let storages = tensors.iter().enumerate().map(|(key, tensor)| (format!("data/{key}"), &tensor.data[..]));
    let pickle = state_dict(tensors);
    let first = [("data.pkl".to_owned(), &pickle[..]), ("byteorder".to_owned(), b"little")];
    zip(&first.into_iter().chain(storages).collect::<Vec<_>>(), false)
}

/// Writes a checkpoint with this pickle, whatever it holds, and one storage of 16 zero bytes named `0`.
pub fn with_pickle(pickle: &[u8]) -> Vec<u8> {
    zip(&[("data.pkl".to_owned(), pickle), ("data/0".to_owned(), &[0; 16])], false)
}

/// Pickles an OrderedDict with `_metadata`, in protocol 2.
fn state_dict(tensors: &[Saved]) -> Vec<u8> {
    let mut p = vec![0x80, 2];
    p.extend(b"ccollections\nOrderedDict\nq\x00)Rq\x01(");
    for (key, tensor) in tensors.iter().enumerate() {
        text(&mut p, &tensor.name);
        p.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut p, "storage");
        p.extend(format!("ctorch\n{}\n", tensor.class).as_bytes());
        text(&mut p, &key.to_string());
        text(&mut p, "cpu");
        let count = tensor.shape.iter().product();
        int(&mut p, count);
        p.extend(b"tQK\x00");
        let strides = (0..tensor.shape.len()).map(|i| tensor.shape[i + 1..].iter().product());
        for sizes in [tensor.shape.clone(), strides.collect()] {
            p.push(b'(');
            sizes.into_iter().for_each(|size| int(&mut p, size));
            p.push(b't');
        }
        p.extend(b"\x89h\x00)RtR");
    }
    p.extend(b"u}");
    text(&mut p, "_metadata");
    p.extend(b"h\x00)R(");
    text(&mut p, "");
    p.push(b'}');
    text(&mut p, "version");
    p.extend(b"K\x01susb.");
    p
}

/// Appends a text to a pickle, as the opcode BINUNICODE.
pub fn text(p: &mut Vec<u8>, text: &str) {
    p.push(b'X');
    p.extend((text.len() as u32).to_le_bytes());
    p.extend(text.as_bytes());
}

fn int(p: &mut Vec<u8>, value: usize) {
    p.push(b'J');
    p.extend(i32::try_from(value).expect("test tensors are small").to_le_bytes());
}

/// Writes a zip archive of stored entries (name, bytes), each of which begins at a multiple of 64 bytes. With `wide` it
/// has the 64-bit forms that archives over 4 GB need.
pub fn zip(entries: &[(String, &[u8])], wide: bool) -> Vec<u8> {
    let mut out = Vec::new();
    let mut directory = Vec::new();
    for (name, data) in entries {
        let name = format!("archive/{name}");
        let crc = crc32fast::hash(data);
        let header = out.len();
        let padding = (header + 34 + name.len()).next_multiple_of(64) - (header + 34 + name.len());
        out.extend(b"PK\x03\x04\0\0\0\0\0\0\0\0\0\0");
        out.extend(crc.to_le_bytes());
        out.extend([(data.len() as u32).to_le_bytes(); 2].concat());
        out.extend((name.len() as u16).to_le_bytes());
        out.extend((padding as u16 + 4).to_le_bytes());
        out.extend(name.as_bytes());
        out.extend(b"FB");
        out.extend((padding as u16).to_le_bytes());
        out.extend(vec![b'Z'; padding]);
        out.extend(*data);

        let extra = match wide {
            true => [
                &[1, 0, 24, 0][..],
                &(data.len() as u64).to_le_bytes(),
                &(data.len() as u64).to_le_bytes(),
                &(header as u64).to_le_bytes(),
            ]
            .concat(),
            false => Vec::new(),
        };
        let narrow = |value: usize| if wide { u32::MAX } else { value as u32 }.to_le_bytes();
        directory.extend(b"PK\x01\x02\0\0\0\0\0\0\0\0\0\0\0\0");
        directory.extend(crc.to_le_bytes());
        directory.extend([narrow(data.len()); 2].concat());
        directory.extend((name.len() as u16).to_le_bytes());
        directory.extend((extra.len() as u16).to_le_bytes());
        directory.extend([0; 10]);
        directory.extend(narrow(header));
        directory.extend(name.as_bytes());
        directory.extend(extra);
    }
    let (start, count) = (out.len() as u64, entries.len() as u64);
    let length = directory.len() as u64;
    out.extend(directory);
    if wide {
        let end = out.len() as u64;
        out.extend(b"PK\x06\x06");
        out.extend(44_u64.to_le_bytes());
        out.extend([0; 12]);
        out.extend([count, count, length, start].map(u64::to_le_bytes).concat());
        out.extend(b"PK\x06\x07\0\0\0\0");
        out.extend(end.to_le_bytes());
        out.extend([1, 0, 0, 0]);
    }
    let narrow = |value: u64| if wide { u32::MAX } else { value as u32 }.to_le_bytes();
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend([(count as u16).to_le_bytes(); 2].concat());
    out.extend([narrow(length), narrow(start)].concat());
    out.extend([0, 0]);
    out
}
