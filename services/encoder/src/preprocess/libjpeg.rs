//! libjpeg-turbo, which Pillow decodes with as well, behind a safe face: a file in memory -> rows of samples.
//!
//! The library reports a fatal error through a callback that must not return; here that callback unwinds (the crate
//! compiles the C code for it), and every call that may unwind is caught. Nothing of the library is used after an error
//! but the function that frees it.

use std::{
    any::Any,
    ffi::{c_int, c_long},
    marker::PhantomData,
    mem,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    ptr,
};

use mozjpeg_sys::{
    J_COLOR_SPACE, JERR_BAD_CROP_SPEC, JWRN_BOGUS_PROGRESSION, JWRN_EXTRANEOUS_DATA, JWRN_HIT_MARKER,
    JWRN_HUFF_BAD_CODE, JWRN_MUST_RESYNC, JWRN_NOT_SEQUENTIAL, jpeg_common_struct, jpeg_create_decompress,
    jpeg_decompress_struct, jpeg_destroy_decompress, jpeg_error_mgr, jpeg_finish_decompress,
    jpeg_progress_mgr, jpeg_read_header, jpeg_read_scanlines, jpeg_resync_to_restart, jpeg_source_mgr,
    jpeg_start_decompress, jpeg_std_error,
};

/// A scan of few bytes can pass over the whole image, so that thousands of them would keep a thread for minutes.
/// Encoders write at most some twenty.
const MAX_SCANS: c_int = 256;

/// With arithmetic coding, jerror.h has two codes more than the binding: JERR_NO_ARITH_TABLE and this one.
const JWRN_ARITH_BAD_CODE: c_int = JERR_BAD_CROP_SPEC + 2;

/// Why libjpeg cannot go on.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Failure {
    /// The file ends before its last row.
    Ended,
    /// The file is broken, in the library's words.
    Broken(String),
}

/// What a file's header says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Header {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) components: usize,
}

/// What the library mended or left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Warning {
    /// The data of the one scan ends before the image does.
    EndsEarly,
    /// The data of one scan of several ends early.
    ScanEndsEarly,
    /// Data that no code stands for.
    BadCode,
    /// A restart marker is not the one that was expected.
    Restart,
    /// Bytes between marker segments.
    Extraneous,
    /// A scan refines what no scan has brought, or brings again what was there.
    ScanOrder,
    /// A sequential scan with the parameters of a progressive one.
    ScanHeader,
}

/// What the samples of a row are to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Samples {
    /// Red, green and blue, from grey as well.
    Rgb,
    /// Cyan, magenta, yellow and black, as they are in the file.
    Inks,
}

/// One decompression. It lives behind a pointer, since its parts point at each other.
pub(super) struct Decompressor<'encoded> {
    parts: ptr::NonNull<Parts>,
    encoded: PhantomData<&'encoded [u8]>,
}

struct Parts {
    library: jpeg_decompress_struct,
    errors: jpeg_error_mgr,
    source: jpeg_source_mgr,
    progress: jpeg_progress_mgr,
    /// A bit for each message code that was a warning, for there may be millions of warnings.
    warned: u128,
}

impl<'encoded> Decompressor<'encoded> {
    pub(super) fn new(encoded: &'encoded [u8]) -> Self {
        // SAFETY: C structures of numbers, pointers and optional functions, for all of which zero is a value. The
        // library fills them; the pointers between them stay good until `drop`, since the box is not moved out of.
        let parts = unsafe {
            let parts = Box::into_raw(Box::new(mem::zeroed::<Parts>()));
            let errors = &mut (*parts).errors;
            jpeg_std_error(errors);
            errors.error_exit = Some(unwind);
            errors.emit_message = Some(note);
            (*parts).source = jpeg_source_mgr {
                next_input_byte: encoded.as_ptr(),
                bytes_in_buffer: encoded.len(),
                init_source: Some(nothing),
                fill_input_buffer: Some(no_more),
                skip_input_data: Some(skip),
                resync_to_restart: Some(jpeg_resync_to_restart),
                term_source: Some(nothing),
            };
            (*parts).progress.progress_monitor = Some(count_scans);
            (*parts).library.common.err = &raw mut (*parts).errors;
            jpeg_create_decompress(&raw mut (*parts).library);
            (*parts).library.common.client_data = (&raw mut (*parts).warned).cast();
            (*parts).library.common.progress = &raw mut (*parts).progress;
            (*parts).library.src = &raw mut (*parts).source;
            parts
        };
        Self { parts: ptr::NonNull::new(parts).expect("a box is somewhere"), encoded: PhantomData }
    }

    /// Reads up to the first scan; nothing of the size of the image is allocated.
    pub(super) fn read_header(&mut self) -> Result<Header, Failure> {
        const SUSPENDED: c_int = 0;
        const TABLES_ONLY: c_int = 2;
        loop {
            // SAFETY: `library` was created, and no call on it has failed.
            match self.caught(|library| unsafe { jpeg_read_header(library, 0) })? {
                SUSPENDED => return Err(Failure::Ended),
                // As Pillow: tables without an image may come before it.
                TABLES_ONLY => {}
                _ => break,
            }
        }
        let library = self.library();
        Ok(Header {
            width: library.image_width,
            height: library.image_height,
            // At most 10, and never negative.
            components: library.num_components as usize,
        })
    }

    /// Allocates for the image, and reads all of a progressive one.
    pub(super) fn start(&mut self, samples: Samples) -> Result<(), Failure> {
        self.library().out_color_space = match samples {
            Samples::Rgb => J_COLOR_SPACE::JCS_RGB,
            Samples::Inks => J_COLOR_SPACE::JCS_CMYK,
        };
        // SAFETY: the header has been read.
        let started = self.caught(|library| unsafe { jpeg_start_decompress(library) })?;
        if started == 0 { Err(Failure::Ended) } else { Ok(()) }
    }

    /// Reads the next row.
    ///
    /// # Panics
    /// When the row has another length than the image's rows.
    pub(super) fn read_row(&mut self, row: &mut [u8]) -> Result<(), Failure> {
        let library = self.library();
        let samples = library.output_width as usize * library.output_components as usize;
        assert_eq!(row.len(), samples, "a row of the image");
        let mut start = row.as_mut_ptr();
        // SAFETY: decompression was started, and `start` has room for a row.
        let rows = self.caught(|library| unsafe { jpeg_read_scanlines(library, &raw mut start, 1) })?;
        if rows == 0 { Err(Failure::Ended) } else { Ok(()) }
    }

    /// Reads on after the last row, to the end of the image or of the file, and returns whether the image has an end.
    pub(super) fn finish(&mut self) -> Result<bool, Failure> {
        // SAFETY: decompression was started.
        Ok(self.caught(|library| unsafe { jpeg_finish_decompress(library) })? != 0)
    }

    /// What was mended or left out so far.
    pub(super) fn warnings(&mut self) -> Vec<Warning> {
        // SAFETY: the box is there until `drop`.
        let warned = unsafe { (*self.parts.as_ptr()).warned };
        // The precision of coefficients is known of progressive files alone.
        let sequential = self.library().coef_bits.is_null();
        let early = if sequential { Warning::EndsEarly } else { Warning::ScanEndsEarly };
        let told = [
            (JWRN_HIT_MARKER, early),
            (JWRN_HUFF_BAD_CODE, Warning::BadCode),
            (JWRN_ARITH_BAD_CODE, Warning::BadCode),
            (JWRN_MUST_RESYNC, Warning::Restart),
            (JWRN_EXTRANEOUS_DATA, Warning::Extraneous),
            (JWRN_BOGUS_PROGRESSION, Warning::ScanOrder),
            (JWRN_NOT_SEQUENTIAL, Warning::ScanHeader),
        ];
        told.into_iter().filter(|(code, _)| warned >> code & 1 == 1).map(|(_, warning)| warning).collect()
    }

    fn library(&mut self) -> &mut jpeg_decompress_struct {
        // SAFETY: the box is there until `drop`.
        unsafe { &mut (*self.parts.as_ptr()).library }
    }

    fn caught<T>(&mut self, call: impl FnOnce(&mut jpeg_decompress_struct) -> T) -> Result<T, Failure> {
        let library = self.library();
        catch_unwind(AssertUnwindSafe(|| call(library))).map_err(|panic: Box<dyn Any + Send>| {
            match panic.downcast::<Failure>() {
                Ok(failure) => *failure,
                Err(panic) => resume_unwind(panic),
            }
        })
    }
}

impl Drop for Decompressor<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw`; freeing what the library holds raises no error.
        unsafe {
            jpeg_destroy_decompress(&mut (*self.parts.as_ptr()).library);
            drop(Box::from_raw(self.parts.as_ptr()));
        }
    }
}

/// Called by the library when it cannot go on.
#[cold]
unsafe extern "C-unwind" fn unwind(library: &mut jpeg_common_struct) {
    // SAFETY: `err` was set before anything could fail, and its formatting function writes a C string of at most 200
    // bytes (JMSG_LENGTH_MAX) to what it is given, whatever the binding says of its length.
    let message = unsafe {
        let mut buffer = [0_u8; 200];
        if let Some(format) = (*library.err).format_message {
            format(library, &*buffer.as_mut_ptr().cast::<[u8; 80]>());
        }
        let length = buffer.iter().position(|&byte| byte == 0).unwrap_or(buffer.len());
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    // Without the panic hook: this is how a broken file is told, not a defect.
    resume_unwind(Box::new(Failure::Broken(message)));
}

/// Called for warnings, which have a level below zero, and for traces.
unsafe extern "C-unwind" fn note(library: &mut jpeg_common_struct, level: c_int) {
    if level < 0 {
        // SAFETY: `err` and `client_data` were set to parts of the box.
        unsafe {
            *library.client_data.cast::<u128>() |= 1_u128.unbounded_shl((*library.err).msg_code as u32)
        };
    }
}

unsafe extern "C-unwind" fn nothing(_: &mut jpeg_decompress_struct) {}

/// The whole file was given at once. What needs more than that is suspended, as in Pillow, and is never resumed.
unsafe extern "C-unwind" fn no_more(_: &mut jpeg_decompress_struct) -> c_int {
    0
}

unsafe extern "C-unwind" fn skip(library: &mut jpeg_decompress_struct, bytes: c_long) {
    // SAFETY: `src` is the source that was set; the library keeps its pointer and length together.
    let source = unsafe { &mut *library.src };
    let bytes = usize::try_from(bytes).unwrap_or(0).min(source.bytes_in_buffer);
    // SAFETY: no further than the end of the file.
    source.next_input_byte = unsafe { source.next_input_byte.add(bytes) };
    source.bytes_in_buffer -= bytes;
}

/// Called for every row of blocks of every scan.
unsafe extern "C-unwind" fn count_scans(library: &mut jpeg_common_struct) {
    // SAFETY: only decompressors are created here, whose first member is this structure.
    let scans = unsafe { (*ptr::from_mut(library).cast::<jpeg_decompress_struct>()).input_scan_number };
    if scans > MAX_SCANS {
        resume_unwind(Box::new(Failure::Broken(format!("it has more than {MAX_SCANS} scans"))));
    }
}
