//! Ids back to text, all at once or as they come.

use std::sync::Arc;

use super::{
    Meaning, Tokenizer,
    model::{Kind, Piece, SPACE},
};

impl Tokenizer {
    /// Returns the text of ids; ids that the vocabulary does not have are passed over. Without special tokens, the text
    /// around them is decoded as if they had never been there. With them, spaces surround most of them, though not
    /// evenly: this is what upstream returns.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut state = State::new(skip_special);
        let mut text = String::new();
        for &id in ids {
            state.push(self, id, &mut text);
        }
        state.finish(&mut text);
        text
    }
}

/// A decoder that turns ids into text as they come. What `push` and `finish` return, joined, is exactly what
/// [`Tokenizer::decode`] gives for all the ids.
///
/// Held back until they are certain: the bytes of an incomplete character; and where special tokens are kept, the text
/// since the last special token, because the official decode puts a space *before* that text if `<s>`, `</s>` or
/// `<unk>` follows it, and none otherwise.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    state: State,
}

impl Detokenizer {
    /// Begins a text; with `skip_special` it holds no special tokens.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Self { tokenizer, state: State::new(skip_special) }
    }

    /// Returns what this id adds to the text; often nothing.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        self.state.push(&self.tokenizer, id, &mut text);
        text
    }

    /// Ends the text and returns what was held back of it.
    pub fn finish(self) -> String {
        let mut text = String::new();
        self.state.finish(&mut text);
        text
    }
}

/// The state between two ids of a text.
struct State {
    skip_special: bool,
    segment: Segment,
    /// The text of the segment, where special tokens are kept.
    held: String,
    /// How many ids came since the last appended special token: the official decode treats each such run on its own and
    /// joins runs and appended tokens with spaces.
    run: usize,
    after_builtin: bool,
    wrote: bool,
}

impl State {
    fn new(skip_special: bool) -> Self {
        Self {
            skip_special,
            segment: Segment::default(),
            held: String::new(),
            run: 0,
            after_builtin: false,
            wrote: false,
        }
    }

    fn push(&mut self, tokenizer: &Tokenizer, id: u32, out: &mut String) {
        match tokenizer.meaning(id) {
            Meaning::Piece(piece) if self.skip_special => self.segment.push(piece, out),
            Meaning::Piece(piece) => {
                self.enter_run(out);
                self.after_builtin = false;
                self.segment.push(piece, &mut self.held);
            }
            Meaning::Builtin(_) | Meaning::Appended(_) if self.skip_special => {}
            Meaning::Builtin(name) => {
                let first = self.run == 0;
                self.enter_run(out);
                if !first && !self.after_builtin {
                    out.push(' ');
                }
                self.end_segment(out);
                out.push_str(name);
                self.after_builtin = true;
            }
            Meaning::Appended(name) => {
                self.end_segment(out);
                self.run = 0;
                self.after_builtin = false;
                self.separate(out);
                out.push_str(name);
            }
            Meaning::Nothing => {}
        }
    }

    fn finish(mut self, out: &mut String) {
        if self.skip_special {
            self.segment.flush(out);
        } else {
            self.end_segment(out);
        }
    }

    fn enter_run(&mut self, out: &mut String) {
        if self.run == 0 {
            self.separate(out);
        }
        self.run += 1;
    }

    fn separate(&mut self, out: &mut String) {
        if self.wrote {
            out.push(' ');
        }
        self.wrote = true;
    }

    fn end_segment(&mut self, out: &mut String) {
        self.segment.flush(&mut self.held);
        self.segment = Segment::default();
        out.push_str(&self.held);
        self.held.clear();
    }
}

/// Pieces that sentencepiece decodes together: the leading space of the first is the dummy prefix and is dropped.
#[derive(Default)]
struct Segment {
    /// The bytes of a character that may still become complete: at most 3.
    bytes: Vec<u8>,
    wrote: bool,
    past_start: bool,
}

impl Segment {
    fn push(&mut self, piece: &Piece, out: &mut String) {
        if let Kind::Byte(byte) = piece.kind {
            self.bytes.push(byte);
            self.settle(out);
            return;
        }
        self.flush(out);
        if piece.kind == Kind::Control {
            return;
        }
        let mut text = piece.text.as_str();
        if !self.past_start
            && !self.wrote
            && let Some(rest) = text.strip_prefix(SPACE)
        {
            text = rest;
            self.past_start = true;
        }
        self.wrote |= !text.is_empty();
        out.extend(text.chars().map(|c| if c == SPACE { ' ' } else { c }));
    }

    /// Writes what is still incomplete at the end of a run of bytes: it is invalid, byte by byte.
    fn flush(&mut self, out: &mut String) {
        out.extend(self.bytes.drain(..).map(|_| char::REPLACEMENT_CHARACTER));
    }

    /// Writes the characters that are certain. An invalid byte becomes one U+FFFD and reading goes on right after
    /// it, where Rust's lossy conversion would take a whole broken sequence as one.
    fn settle(&mut self, out: &mut String) {
        self.wrote = true;
        while let Err(error) = std::str::from_utf8(&self.bytes) {
            self.write(error.valid_up_to(), out);
            if error.error_len().is_none() {
                return;
            }
            self.bytes.remove(0);
            out.push(char::REPLACEMENT_CHARACTER);
        }
        self.write(self.bytes.len(), out);
    }

    fn write(&mut self, len: usize, out: &mut String) {
        out.push_str(std::str::from_utf8(&self.bytes[..len]).expect("from_utf8 found this much valid"));
        self.bytes.drain(..len);
    }
}
