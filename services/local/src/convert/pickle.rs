//! Reads the pickle of a torch.save'd state dict, and nothing else.
//!
//! A pickle is a program; unpickling one runs whatever it names. This reader knows only what torch.save writes for a
//! dict of tensors: any other global is refused by its name before anything is done with it, and nothing is called.
//! Tensors stay descriptions of where their values lie. Protocols 2 to 5; `pickletools` of Python's standard library
//! says what each opcode means.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
};

use safetensors::Dtype;

/// Values that a pickle may build at most. A tensor takes some fifteen, and Emu2 has fewer than 3,000 tensors; together with
/// the next this bounds memory to 200 MB, whatever a pickle of the largest size says.
const MAX_VALUES: usize = 1 << 18;
/// Dimensions that a tensor may have; a convolution has four.
const MAX_DIMENSIONS: usize = 8;
/// The only attribute of a state dict that is let through; it holds versions of modules, which nothing needs.
const METADATA: &str = "_metadata";

#[derive(Debug, thiserror::Error, PartialEq)]
pub(super) enum PickleError {
    #[error("a pickle that calls code: {0}")]
    Code(String),
    #[error("not a dict of tensors as torch.save writes it: {0}")]
    Malformed(String),
}

/// Where the values of a tensor lie in its storage; offset, shape and strides are counted in values, not in bytes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct StoredTensor<'a> {
    pub(super) storage: Storage<'a>,
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    pub(super) strides: Vec<u64>,
}

/// A contiguous run of values, which several tensors may share.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Storage<'a> {
    pub(super) key: &'a str,
    pub(super) dtype: Dtype,
    pub(super) values: u64,
}

/// Returns the tensors of a pickled state dict, in its order.
///
/// # Errors
///
/// The pickle is malformed, or would call code when PyTorch reads it.
pub(super) fn read(pickle: &[u8]) -> Result<Vec<(&str, StoredTensor<'_>)>, PickleError> {
    let mut machine = Machine { bytes: pickle, ..Machine::default() };
    let top = machine.run()?;
    machine.state_dict(top)
}

/// An index into the machine's values: what the memo shares is not copied, so that nothing grows by being named often.
type Id = usize;

#[derive(Debug)]
enum Node<'a> {
    None,
    Bool,
    Int(i64),
    Text(&'a str),
    Tuple(Vec<Id>),
    List,
    Dict { ordered: bool, items: Vec<(Id, Id)> },
    Global(Global),
    Storage(Storage<'a>),
    Tensor(Box<StoredTensor<'a>>),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

#[derive(Default)]
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack at which MARK was executed.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Id, PickleError> {
        loop {
            match self.byte()? {
                b'.' => break,
                opcode => self.step(opcode)?,
            }
        }
        match (self.stack.as_slice(), self.marks.is_empty(), self.at == self.bytes.len()) {
            ([top], true, true) => Ok(*top),
            _ => Err(self.malformed("something is left when it ends")),
        }
    }

    fn step(&mut self, opcode: u8) -> Result<(), PickleError> {
        match opcode {
            // PROTO, FRAME
            0x80 => match self.byte()? {
                2..=5 => Ok(()),
                protocol => Err(self.malformed(format!("protocol {protocol}"))),
            },
            0x95 => self.take(8).map(|_| ()),
            // MARK
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            // NONE, NEWTRUE, NEWFALSE, BININT, BININT1, BININT2, LONG1
            b'N' => self.push(Node::None),
            0x88 | 0x89 => self.push(Node::Bool),
            b'J' => {
                let int = i32::from_le_bytes(self.array()?);
                self.push(Node::Int(int.into()))
            }
            b'K' => {
                let int = self.byte()?;
                self.push(Node::Int(int.into()))
            }
            b'M' => {
                let int = u16::from_le_bytes(self.array()?);
                self.push(Node::Int(int.into()))
            }
            0x8a => self.long(),
            // BINUNICODE, SHORT_BINUNICODE
            b'X' => {
                let length = u32::from_le_bytes(self.array()?);
                self.text(length)
            }
            0x8c => {
                let length = self.byte()?;
                self.text(length.into())
            }
            // EMPTY_TUPLE, TUPLE, TUPLE1, TUPLE2, TUPLE3
            b')' => self.push(Node::Tuple(Vec::new())),
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Tuple(items))
            }
            0x85..=0x87 => self.tuple(usize::from(opcode - 0x84)),
            // EMPTY_LIST: the only list of a state dict is that of no hooks.
            b']' => self.push(Node::List),
            // EMPTY_DICT, SETITEM, SETITEMS
            b'}' => self.push(Node::Dict { ordered: false, items: Vec::new() }),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(&[key, value])
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set(&items)
            }
            b'q' | b'r' | b'h' | b'j' | 0x94 => self.memo(opcode),
            b'c' => self.global_by_line(),
            0x93 => self.global_by_stack(),
            b'Q' => self.storage(),
            b'R' => self.reduce(),
            b'b' => self.build(),
            _ => Err(self.refuse(opcode)),
        }
    }

    /// Executes BINPUT, LONG_BINPUT, BINGET, LONG_BINGET and MEMOIZE.
    fn memo(&mut self, opcode: u8) -> Result<(), PickleError> {
        let key = match opcode {
            b'q' | b'h' => self.byte()?.into(),
            0x94 => u32::try_from(self.memo.len()).map_err(|_| self.malformed("memo"))?,
            _ => u32::from_le_bytes(self.array()?),
        };
        if matches!(opcode, b'h' | b'j') {
            let id = *self.memo.get(&key).ok_or_else(|| self.malformed("a value that was not remembered"))?;
            self.stack.push(id);
        } else {
            let id = self.top()?;
            self.memo.insert(key, id);
        }
        Ok(())
    }

    fn long(&mut self) -> Result<(), PickleError> {
        let length = usize::from(self.byte()?);
        let digits = self.take(length)?;
        if length > 8 {
            return Err(self.malformed("an integer of more than 64 bits"));
        }
        let mut bytes = [if digits.last().is_some_and(|top| top & 0x80 != 0) { 0xff } else { 0 }; 8];
        bytes[..length].copy_from_slice(digits);
        self.push(Node::Int(i64::from_le_bytes(bytes)))
    }

    fn text(&mut self, length: u32) -> Result<(), PickleError> {
        let bytes = self.take(length as usize)?;
        let text = std::str::from_utf8(bytes).map_err(|_| self.malformed("a text that is not UTF-8"))?;
        self.push(Node::Text(text))
    }

    fn tuple(&mut self, length: usize) -> Result<(), PickleError> {
        let mut items = (0..length).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        self.push(Node::Tuple(items))
    }

    fn set(&mut self, pairs: &[Id]) -> Result<(), PickleError> {
        let dict = self.top()?;
        if !pairs.len().is_multiple_of(2) {
            return Err(self.malformed("a key without a value"));
        }
        match &mut self.nodes[dict] {
            Node::Dict { items, .. } => {
                items.extend(pairs.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                Ok(())
            }
            _ => Err(self.malformed("items of something that is no dict")),
        }
    }

    /// Executes GLOBAL, whose names stand on two lines.
    fn global_by_line(&mut self) -> Result<(), PickleError> {
        let (module, name) = (self.line()?, self.line()?);
        self.global(&module, &name)
    }

    /// Executes STACK_GLOBAL, whose names lie on the stack.
    fn global_by_stack(&mut self) -> Result<(), PickleError> {
        let (name, module) = (self.pop()?, self.pop()?);
        match (&self.nodes[module], &self.nodes[name]) {
            (Node::Text(module), Node::Text(name)) => self.global(module, name),
            _ => Err(self.malformed("a global that is not named by texts")),
        }
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), PickleError> {
        let global = match (module, name) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", name) if storage_dtype(name).is_some() => {
                Global::Storage(storage_dtype(name).expect("it was just looked up"))
            }
            _ => return Err(PickleError::Code(shown(&format!("{module}.{name}")))),
        };
        self.push(Node::Global(global))
    }

    /// Executes BINPERSID of the persistent id that torch.save writes: ("storage", class, key, device, values).
    fn storage(&mut self) -> Result<(), PickleError> {
        let id = self.pop()?;
        let Node::Tuple(fields) = &self.nodes[id] else {
            return Err(self.malformed("a persistent id that is no tuple"));
        };
        let fields: Vec<_> = fields.iter().map(|&field| &self.nodes[field]).collect();
        let storage = match fields[..] {
            [
                Node::Text("storage"),
                &Node::Global(Global::Storage(dtype)),
                &Node::Text(key),
                Node::Text(_),
                &Node::Int(values),
            ] if values >= 0 => Storage { key, dtype, values: values as u64 },
            _ => return Err(self.malformed("a persistent id that is no storage")),
        };
        self.push(Node::Storage(storage))
    }

    fn reduce(&mut self) -> Result<(), PickleError> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let Node::Tuple(arguments) = &self.nodes[arguments] else {
            return Err(self.malformed("arguments that are no tuple"));
        };
        let fields: Vec<_> = arguments.iter().map(|&argument| &self.nodes[argument]).collect();
        let made = match (&self.nodes[callable], &fields[..]) {
            (Node::Global(Global::OrderedDict), []) => Node::Dict { ordered: true, items: Vec::new() },
            (
                Node::Global(Global::RebuildTensor),
                [Node::Storage(storage), Node::Int(offset), shape, strides, Node::Bool, hooks, rest @ ..],
            ) if *offset >= 0 && is_empty(hooks) && rest.iter().all(|metadata| is_empty(metadata)) => {
                let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
                let storage = storage.clone();
                Node::Tensor(Box::new(StoredTensor { storage, offset: *offset as u64, shape, strides }))
            }
            (Node::Global(Global::RebuildParameter), [Node::Tensor(tensor), Node::Bool, hooks])
                if is_empty(hooks) =>
            {
                Node::Tensor(tensor.clone())
            }
            (Node::Global(global), _) => return Err(self.malformed(format!("arguments of {global}"))),
            _ => return Err(self.malformed("a call of something that is no global")),
        };
        self.push(made)
    }

    fn sizes(&self, node: &Node<'_>) -> Result<Vec<u64>, PickleError> {
        let size = |&id: &Id| match self.nodes[id] {
            Node::Int(size) => u64::try_from(size).ok(),
            _ => None,
        };
        let Node::Tuple(sizes) = node else { return Err(self.malformed("a shape that is no tuple")) };
        if sizes.len() > MAX_DIMENSIONS {
            return Err(self.malformed(format!("{} dimensions", sizes.len())));
        }
        let sizes = sizes.iter().map(size).collect::<Option<_>>();
        sizes.ok_or_else(|| self.malformed("a shape that does not consist of sizes"))
    }

    /// Executes BUILD. It would call `__setstate__` or set attributes, so that only a state dict's `_metadata` passes,
    /// which is dropped.
    fn build(&mut self) -> Result<(), PickleError> {
        let (state, target) = (self.pop()?, self.top()?);
        let ordered = matches!(self.nodes[target], Node::Dict { ordered: true, .. });
        let Node::Dict { items, .. } = &self.nodes[state] else {
            return Err(PickleError::Code("BUILD, which calls __setstate__".to_owned()));
        };
        let reason = match items[..] {
            [] => return Ok(()),
            [(key, _)] => match self.nodes[key] {
                Node::Text(METADATA) if ordered => return Ok(()),
                Node::Text(key) => format!("BUILD, which sets {}", shown(key)),
                _ => "BUILD".to_owned(),
            },
            _ => "BUILD, which sets several attributes".to_owned(),
        };
        Err(PickleError::Code(reason))
    }

    /// Returns the error of an opcode that no state dict has; of one that calls something, it says what.
    fn refuse(&mut self, opcode: u8) -> PickleError {
        let calls = match opcode {
            b'i' => match (self.line(), self.line()) {
                (Ok(module), Ok(name)) => format!("INST of {}", shown(&format!("{module}.{name}"))),
                _ => "INST".to_owned(),
            },
            b'o' => "OBJ".to_owned(),
            0x81 => "NEWOBJ".to_owned(),
            0x92 => "NEWOBJ_EX".to_owned(),
            0x82..=0x84 => "EXT, a global of the extension registry".to_owned(),
            b'P' => "PERSID".to_owned(),
            _ => return self.malformed(format!("opcode {opcode:#04x}")),
        };
        PickleError::Code(calls)
    }

    /// Returns the tensors of the dict on top of the stack, once the program has run.
    fn state_dict(mut self, top: Id) -> Result<Vec<(&'a str, StoredTensor<'a>)>, PickleError> {
        let Node::Dict { items, .. } = std::mem::replace(&mut self.nodes[top], Node::None) else {
            return Err(self.malformed("its value is no dict"));
        };
        let entry = |(key, value): (Id, Id)| match (&self.nodes[key], &self.nodes[value]) {
            (Node::Text(name), Node::Tensor(tensor)) => Ok((*name, (**tensor).clone())),
            (Node::Text(name), _) => Err(self.malformed(format!("`{}` is no tensor", shown(name)))),
            _ => Err(self.malformed("a key that is no text")),
        };
        let mut names = BTreeSet::new();
        let mut entries = Vec::new();
        for item in items {
            let (name, tensor) = entry(item)?;
            if !names.insert(name) {
                return Err(self.malformed(format!("`{}` stands in it twice", shown(name))));
            }
            entries.push((name, tensor));
        }
        Ok(entries)
    }

    fn push(&mut self, node: Node<'a>) -> Result<(), PickleError> {
        if self.nodes.len() == MAX_VALUES {
            return Err(self.malformed(format!("more than {MAX_VALUES} values")));
        }
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
        Ok(())
    }

    fn top(&self) -> Result<Id, PickleError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let above = self.stack.get(floor..).and_then(<[Id]>::last);
        above.copied().ok_or_else(|| self.malformed("a value is missing"))
    }

    fn pop(&mut self) -> Result<Id, PickleError> {
        let id = self.top()?;
        self.stack.pop();
        Ok(id)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        let mark = self.marks.pop().ok_or_else(|| self.malformed("a mark is missing"))?;
        Ok(self.stack.split_off(mark))
    }

    fn line(&mut self) -> Result<String, PickleError> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|&byte| byte == b'\n');
        let length = length.ok_or_else(|| self.malformed("it ends in the middle"))?;
        self.at += length + 1;
        Ok(String::from_utf8_lossy(&rest[..length]).into_owned())
    }

    fn byte(&mut self) -> Result<u8, PickleError> {
        self.array().map(|[byte]| byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        self.take(N).map(|bytes| bytes.try_into().expect("so many were taken"))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], PickleError> {
        let (taken, _) = self.bytes[self.at..]
            .split_at_checked(length)
            .ok_or_else(|| self.malformed("it ends in the middle"))?;
        self.at += length;
        Ok(taken)
    }

    fn malformed(&self, reason: impl fmt::Display) -> PickleError {
        PickleError::Malformed(format!("{reason} (at byte {})", self.at))
    }
}

impl fmt::Display for Global {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OrderedDict => f.write_str("collections.OrderedDict"),
            Self::RebuildTensor => f.write_str("torch._utils._rebuild_tensor_v2"),
            Self::RebuildParameter => f.write_str("torch._utils._rebuild_parameter"),
            Self::Storage(dtype) => write!(f, "a storage of {dtype:?}"),
        }
    }
}

/// Returns a text of the file as it is fit for a message: short, and without control characters.
fn shown(text: &str) -> String {
    text.chars().take(200).collect::<String>().escape_debug().to_string()
}

fn is_empty(node: &Node<'_>) -> bool {
    matches!(node, Node::None | Node::List) || matches!(node, Node::Dict { items, .. } if items.is_empty())
}

fn storage_dtype(class: &str) -> Option<Dtype> {
    Some(match class {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        _ => return None,
    })
}
