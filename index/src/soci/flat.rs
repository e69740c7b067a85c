//! Bounds-checked reading of FlatBuffers (flatbuffers.dev, "FlatBuffer Internals"): tables, strings and vectors.
//!
//! Nothing is assumed of the bytes: every place is checked before it is read, and no alignment is needed.

/// What is wrong with a buffer.
pub(super) type Fault = &'static str;

const OUTSIDE: Fault = "it points outside itself";

/// A table: fields by slot, each of which may be absent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table<'a> {
    buffer: &'a [u8],
    at: usize,
    /// Offsets of the fields from `at`, two bytes each.
    slots: &'a [u8],
}

/// Offsets to strings or tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offsets<'a> {
    buffer: &'a [u8],
    at: usize,
    len: usize,
}

fn bytes<const N: usize>(buffer: &[u8], at: usize) -> Result<[u8; N], Fault> {
    buffer.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or(OUTSIDE)
}

/// Where the unsigned offset at `at` points to.
fn follow(buffer: &[u8], at: usize) -> Result<usize, Fault> {
    let offset = u32::from_le_bytes(bytes(buffer, at)?) as usize;
    at.checked_add(offset).filter(|target| *target < buffer.len()).ok_or(OUTSIDE)
}

/// A vector of bytes, or a string without its NUL.
fn vector(buffer: &[u8], at: usize) -> Result<&[u8], Fault> {
    let len = u32::from_le_bytes(bytes(buffer, at)?) as usize;
    buffer.get(at + 4..).and_then(|rest| rest.get(..len)).ok_or(OUTSIDE)
}

impl<'a> Table<'a> {
    /// The root table.
    pub(super) fn root(buffer: &'a [u8]) -> Result<Self, Fault> {
        Self::at(buffer, follow(buffer, 0)?)
    }

    fn at(buffer: &'a [u8], at: usize) -> Result<Self, Fault> {
        // The table starts with the signed distance back to its vtable.
        let back = i64::from(i32::from_le_bytes(bytes(buffer, at)?));
        let vtable = i64::try_from(at).ok().and_then(|at| usize::try_from(at - back).ok()).ok_or(OUTSIDE)?;
        let len = usize::from(u16::from_le_bytes(bytes(buffer, vtable)?));
        let vtable = buffer.get(vtable..).and_then(|rest| rest.get(..len)).ok_or(OUTSIDE)?;
        // Its own length and the table's come first.
        let slots = vtable.get(4..).ok_or("a table has no table of fields")?;
        Ok(Self { buffer, at, slots })
    }

    /// Where field `slot` lies; `None` if it is absent.
    fn field(&self, slot: usize) -> Result<Option<usize>, Fault> {
        match self.slots.get(slot * 2..).and_then(|rest| rest.first_chunk()) {
            None => Ok(None),
            Some(offset) => match u16::from_le_bytes(*offset) {
                0 => Ok(None),
                offset => self.at.checked_add(offset.into()).map(Some).ok_or(OUTSIDE),
            },
        }
    }

    fn scalar<const N: usize>(&self, slot: usize) -> Result<Option<[u8; N]>, Fault> {
        self.field(slot)?.map(|at| bytes(self.buffer, at)).transpose()
    }

    /// A `byte`.
    pub(super) fn i8(&self, slot: usize, default: i8) -> Result<i8, Fault> {
        Ok(self.scalar(slot)?.map_or(default, i8::from_le_bytes))
    }

    /// An `int`.
    pub(super) fn i32(&self, slot: usize) -> Result<i32, Fault> {
        Ok(self.scalar(slot)?.map_or(0, i32::from_le_bytes))
    }

    /// A `uint`.
    pub(super) fn u32(&self, slot: usize) -> Result<u32, Fault> {
        Ok(self.scalar(slot)?.map_or(0, u32::from_le_bytes))
    }

    /// A `long`.
    pub(super) fn i64(&self, slot: usize) -> Result<i64, Fault> {
        Ok(self.scalar(slot)?.map_or(0, i64::from_le_bytes))
    }

    /// A string or a vector of bytes; empty if absent.
    pub(super) fn bytes(&self, slot: usize) -> Result<&'a [u8], Fault> {
        match self.field(slot)? {
            None => Ok(&[]),
            Some(at) => vector(self.buffer, follow(self.buffer, at)?),
        }
    }

    /// A table in this one.
    pub(super) fn table(&self, slot: usize) -> Result<Option<Self>, Fault> {
        self.field(slot)?.map(|at| Self::at(self.buffer, follow(self.buffer, at)?)).transpose()
    }

    /// A vector of strings or tables; empty if absent.
    pub(super) fn offsets(&self, slot: usize) -> Result<Offsets<'a>, Fault> {
        let buffer = self.buffer;
        let Some(at) = self.field(slot)? else { return Ok(Offsets { buffer, at: 0, len: 0 }) };
        let at = follow(buffer, at)?;
        let len = u32::from_le_bytes(bytes(buffer, at)?) as usize;
        let at = at + 4;
        if len > buffer.len().saturating_sub(at) / 4 {
            return Err("it counts more elements than it has room for");
        }
        Ok(Offsets { buffer, at, len })
    }
}

impl<'a> Offsets<'a> {
    /// Number of elements; they all lie inside the buffer, what they point to need not.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn element(&self, i: usize) -> Result<usize, Fault> {
        if i >= self.len {
            return Err(OUTSIDE);
        }
        follow(self.buffer, self.at + i * 4)
    }

    /// Element `i`, a string.
    pub(super) fn bytes(&self, i: usize) -> Result<&'a [u8], Fault> {
        vector(self.buffer, self.element(i)?)
    }

    /// Element `i`, a table.
    pub(super) fn table(&self, i: usize) -> Result<Table<'a>, Fault> {
        Table::at(self.buffer, self.element(i)?)
    }
}
