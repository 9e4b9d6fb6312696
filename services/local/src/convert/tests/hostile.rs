//! Pickles that call code, and files that are not what they say.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use emu2_nn::golden::torch_save::{text, with_pickle, zip};

use super::{
    super::{
        pickle::{self, PickleError},
        source::Source,
    },
    *,
};

/// Most bytes that a file of a few kilobytes may have a reader hold.
const BOUND: usize = 8 << 20;

/// Counts what each thread holds, and the most that it held.
struct Counting;

thread_local! {
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn count(bytes: isize) {
    let _ = HELD.try_with(|held| {
        let now = held.get().0 + bytes;
        held.set((now, held.get().1.max(now)));
    });
}

// SAFETY: hands on to the system's allocator, and counts in a cell that needs none.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most bytes that `work` held on this thread beyond what was held before.
fn most_held(work: impl FnOnce()) -> usize {
    let before = HELD.get().0;
    HELD.set((before, before));
    work();
    (HELD.get().1 - before) as usize
}

fn opcodes(parts: &[&[u8]]) -> Vec<u8> {
    [&[0x80, 2], parts.concat().as_slice(), b"."].concat()
}

fn short(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    self::text(&mut bytes, text);
    bytes
}

#[test]
fn pickles_that_call_code_are_refused_by_name() {
    let marked = tempfile::tempdir().unwrap();
    let marker = marked.path().join("it-ran");
    let command = [b"(".to_vec(), short(&format!("touch {}", marker.display())), b"t".to_vec()].concat();
    let ordered = b"ccollections\nOrderedDict\n";
    for (pickle, calls) in [
        (opcodes(&[b"cposix\nsystem\n", &command, b"R"]), "posix.system"),
        (opcodes(&[&short("os"), &short("system"), b"\x93", &command, b"R"]), "os.system"),
        (opcodes(&[b"\x8c\x08builtins\x8c\x04eval\x93", &command, b"R"]), "builtins.eval"),
        // Never called, but named.
        (opcodes(&[b"}", &short("a"), b"cbuiltins\nexec\ns"]), "builtins.exec"),
        (opcodes(&[b"(", &short("ls"), b"iposix\nsystem\n"]), "INST of posix.system"),
        (opcodes(&[b"(", ordered, b"o"]), "OBJ"),
        (opcodes(&[ordered, b")\x81"]), "NEWOBJ"),
        (opcodes(&[ordered, b")}\x92"]), "NEWOBJ_EX"),
        (opcodes(&[b"\x82\x01"]), "EXT, a global of the extension registry"),
        (opcodes(&[b"P0\n"]), "PERSID"),
        (opcodes(&[ordered, b")R}", &short("__setstate__"), b"Nsb"]), "BUILD, which sets __setstate__"),
        (opcodes(&[ordered, b")R}", &short("__dict__"), b"}sb"]), "BUILD, which sets __dict__"),
        (opcodes(&[ordered, b")R)b"]), "BUILD, which calls __setstate__"),
        (opcodes(&[b"}}", &short("_metadata"), b"}sb"]), "BUILD, which sets _metadata"),
        // Of torch, too, all is refused but what is known to make tensors.
        (opcodes(&[b"ctorch\nload\n", &command, b"R"]), "torch.load"),
        (opcodes(&[b"ctorch._utils\n_rebuild_tensor_v3\n"]), "torch._utils._rebuild_tensor_v3"),
        (opcodes(&[b"ctorch.storage\n_load_from_bytes\n"]), "torch.storage._load_from_bytes"),
        (opcodes(&[b"ccollections\nOrderedDict.x\n"]), "collections.OrderedDict.x"),
        (opcodes(&[b"c\x1b[2J\nx\n"]), "\\u{1b}[2J.x"),
    ] {
        assert_eq!(pickle::read(&pickle).unwrap_err(), PickleError::Code(calls.to_owned()));
        let input = tempfile::tempdir().unwrap();
        fs::write(input.path().join("pytorch_model.bin"), with_pickle(&pickle)).unwrap();
        let error = error(&conversion(input.path(), &input.path().join("out")));
        assert!(error.ends_with(&format!("pytorch_model.bin: a pickle that calls code: {calls}")), "{error}");
    }
    assert!(!marker.exists());
    let long = opcodes(&[b"c", &vec![b'x'; 1 << 20], b"\ny\n"]);
    assert!(pickle::read(&long).unwrap_err().to_string().len() < 300);
}

/// A pickle of one tensor: storage class and values, offset, sizes, strides.
fn tensor(class: &str, values: &[u8], offset: &[u8], sizes: &[u8], strides: &[u8]) -> Vec<u8> {
    let class = format!("ctorch\n{class}\n");
    let storage =
        [b"(", &short("storage")[..], class.as_bytes(), &short("0"), &short("cpu"), values, b"tQ"].concat();
    let rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(";
    opcodes(&[b"}", &short("a"), rebuild, &storage, offset, b"(", sizes, b"t(", strides, b"t\x89NtRs"])
}

#[test]
fn tensors_lie_in_their_storage() {
    const HUGE: &[u8] = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.bin");
    let open = |pickle: &[u8]| {
        fs::write(&path, with_pickle(pickle)).unwrap();
        Source::open(&path).map_err(|error| format!("{error:#}"))
    };
    assert!(open(&tensor("FloatStorage", b"K\x04", b"K\x00", b"K\x02K\x02", b"K\x02K\x01")).is_ok());
    assert!(open(&tensor("FloatStorage", b"K\x04", b"K\x04", b"K\x00", b"K\x01")).is_ok());
    let empty = [b"K\x00", HUGE, HUGE].concat();
    assert!(
        open(&tensor("FloatStorage", b"K\x04", b"K\x00", &empty, &[HUGE, HUGE, b"K\x01"].concat())).is_ok()
    );
    for (values, offset, sizes, strides, reason) in [
        (&b"K\x05"[..], &b"K\x00"[..], &b"K\x02"[..], &b"K\x01"[..], "must have 5 values, has 16 bytes"),
        (b"K\x04", b"K\x03", b"K\x02", b"K\x01", "does not lie in its storage"),
        (b"K\x04", b"K\x00", b"K\x02", b"K\x04", "does not lie in its storage"),
        (b"K\x04", b"K\x00", b"K\x05", b"K\x00", "has 5 values in a storage of 4"),
        (b"K\x04", b"K\x00", HUGE, b"K\x00", "values in a storage of 4"),
        (b"K\x04", b"K\x00", b"K\x02", HUGE, "does not lie in its storage"),
        (b"K\x04", HUGE, b"K\x02", b"K\x01", "does not lie in its storage"),
        (b"K\x04", b"K\x00", &[HUGE, HUGE].concat(), b"K\x01K\x01", "does not lie in its storage"),
        (b"K\x04", b"K\x00", b"K\x02", b"K\x01K\x01", "1 dimensions, 2 strides"),
        (HUGE, b"K\x00", b"K\x02", b"K\x01", "values, has 16 bytes"),
        (b"\x8a\x01\xff", b"K\x00", b"K\x02", b"K\x01", "a persistent id that is no storage"),
        (b"K\x04", b"\x8a\x01\xff", b"K\x02", b"K\x01", "arguments of torch._utils._rebuild_tensor_v2"),
        (b"K\x04", b"K\x00", b"\x8a\x01\xff", b"K\x01", "a shape that does not consist of sizes"),
        (b"K\x04", b"K\x00", b"NNN", b"K\x01", "a shape that does not consist of sizes"),
        (b"K\x04", b"K\x00", &b"K\x01".repeat(9), b"K\x01", "9 dimensions"),
    ] {
        let error = open(&tensor("FloatStorage", values, offset, sizes, strides)).unwrap_err();
        assert!(error.contains(reason), "{error}, not {reason}");
    }
    let twice = opcodes(&[b"}(", &short("a"), b"K\x01", &short("a"), b"K\x01u"]);
    assert!(open(&twice).unwrap_err().contains("`a` is no tensor"));
    for pickle in
        [b"\x80\x02.".to_vec(), opcodes(&[b"(}"]), opcodes(&[b"}}"]), opcodes(&[b"N"]), opcodes(&[b"h\x07"])]
    {
        assert!(open(&pickle).unwrap_err().contains("not a dict of tensors"));
    }
}

#[test]
fn bombs_are_bounded() {
    // A pickle of 16 MB may build 200 MB; deeper nesting, sharing and repetition cannot make it more.
    let shared = [&b"\x80\x02("[..], &vec![b'N'; 100_000], b"tq\x00", &b"h\x00".repeat(1_000_000)].concat();
    let repeated =
        [b"\x80\x02}q\x00(".as_slice(), &short("a"), b"q\x01", &b"h\x01".repeat(1_000_000), b"u."].concat();
    let marks = [&b"\x80\x02"[..], &vec![b'('; 1 << 20]].concat();
    let values = [&b"\x80\x02"[..], &vec![b'N'; 16 << 20]].concat();
    for pickle in [shared, repeated, marks, values] {
        let held = most_held(|| assert!(pickle::read(&pickle).is_err()));
        assert!(held < 100 << 20, "{held}");
    }
}

/// Opens a file and reads all its values, as a conversion would.
fn consume(path: &Path) -> Result<()> {
    let source = Source::open(path)?;
    for tensor in source.tensors.values() {
        source.read(tensor, |_| Ok(()))?;
    }
    Ok(())
}

#[test]
fn damaged_files_neither_panic_nor_allocate() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.bin");
    let wide = {
        let archive = with_pickle(&tensor("FloatStorage", b"K\x04", b"K\x00", b"K\x02K\x02", b"K\x02K\x01"));
        fs::write(&path, &archive).unwrap();
        let pickle = tensor("FloatStorage", b"K\x04", b"K\x00", b"K\x02K\x02", b"K\x01K\x02");
        zip(&[("data.pkl".to_owned(), &pickle), ("data/0".to_owned(), &[0; 16])], true)
    };
    let originals = [fs::read(fixture("state.bin")).unwrap(), wide];
    // xorshift64: the same files in every run.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let mut refused = 0;
    for original in &originals {
        fs::write(&path, original).unwrap();
        consume(&path).unwrap();
        for _ in 0..600 {
            let mut bytes = original.clone();
            for _ in 0..1 + random(4) {
                let at = random(bytes.len());
                match random(4) {
                    0 => bytes[at] ^= 1 << random(8),
                    1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random(5)],
                    2 => {
                        let end = bytes.len().min(at + 8);
                        bytes[at..end].fill(0xff);
                    }
                    _ => bytes.truncate(at.max(1)),
                }
            }
            fs::write(&path, &bytes).unwrap();
            let held = most_held(|| refused += usize::from(consume(&path).is_err()));
            assert!(held < BOUND, "{held} bytes");
        }
    }
    assert!(refused > 300, "{refused}");
}

#[test]
fn only_plain_zip_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.bin");
    let refused = |bytes: &[u8], reason: &str| {
        fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", Source::open(&path).unwrap_err());
        assert!(error.contains(reason), "{error}, not {reason}");
    };
    refused(&zip(&[("version".to_owned(), b"3")], false), "it has no data.pkl");
    refused(
        &zip(&[("data.pkl".to_owned(), b"\x80\x02}."), ("byteorder".to_owned(), b"big")], false),
        "little-endian",
    );
    let twice = [("data/0".to_owned(), &b""[..]), ("data/0".to_owned(), b"")];
    refused(&zip(&twice, false), "archive/data/0 stands in it twice");
    let twice = [("data.pkl".to_owned(), &b"\x80\x02}."[..]), ("data.pkl".to_owned(), b"\x80\x02N.")];
    refused(&zip(&twice, false), "archive/data.pkl stands in it twice");
    let plain = with_pickle(&tensor("FloatStorage", b"K\x04", b"K\x00", b"K\x04", b"K\x01"));
    let directory = plain.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
    for (at, reason) in [(10, "is compressed"), (8, "is encrypted")] {
        let mut bytes = plain.clone();
        bytes[directory + at] = 1;
        refused(&bytes, reason);
    }
    refused(b"{\"a\": 1}", "not a zip file as torch.save writes it, or cut short");
}
