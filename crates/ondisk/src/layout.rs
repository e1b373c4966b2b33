//! Names, offsets and sizes of the fields of each structure, so that the documentation can be
//! held against the code.

/// One field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name in the code and in the documentation.
    pub name: &'static str,
    /// Offset in bytes.
    pub offset: usize,
    /// Size in bytes.
    pub size: usize,
}

/// One structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Its name.
    pub name: &'static str,
    /// Its size in bytes.
    pub size: usize,
    /// Its fields, in order.
    pub fields: &'static [Field],
}

/// Defines a fixed layout without padding, together with its [`Layout`].
macro_rules! layout {
    ($(#[$doc:meta])* struct $name:ident as $title:literal = $constant:ident {
        $($field:ident: $type:ty,)*
    }) => {
        #[derive(
            Clone, Copy,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
            zerocopy::Unaligned,
        )]
        #[repr(C)]
        struct $name {
            $($field: $type,)*
        }

        $(#[$doc])*
        pub const $constant: crate::Layout = crate::Layout {
            name: $title,
            size: std::mem::size_of::<$name>(),
            fields: &[$(crate::Field {
                name: stringify!($field),
                offset: std::mem::offset_of!($name, $field),
                size: std::mem::size_of::<$type>(),
            },)*],
        };
    };
}

pub(crate) use layout;
