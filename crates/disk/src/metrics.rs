//! Counters of one server of a frontend. They belong to its thread.

use std::cell::Cell;

/// A number that a single thread counts.
#[derive(Debug, Default)]
pub struct Counter(Cell<u64>);

impl Counter {
    /// Counts some more.
    pub fn add(&self, count: u64) {
        self.0.set(self.0.get().wrapping_add(count));
    }

    /// A gauge goes down by one.
    pub fn subtract_one(&self) {
        self.0.set(self.0.get().wrapping_sub(1));
    }

    /// What was counted.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.get()
    }
}

/// Declares what a server counts: `Metrics`, with a live [`Counter`] for each line, and `Snapshot`, plain
/// data for others, whose `values` have each with its stable name and whether it is a gauge. A test holds
/// the page that `in` names, of the workspace, to them: each has a row in a table, in this order.
#[macro_export]
macro_rules! metrics {
    (in $page:literal; $($(#[$doc:meta])* $field:ident: $kind:ident = $name:literal,)*) => {
        /// The live counters.
        #[derive(Debug, Default)]
        pub(crate) struct Metrics {
            $(pub(crate) $field: $crate::metrics::Counter,)*
        }

        impl Metrics {
            pub(crate) fn snapshot(&self) -> Snapshot {
                Snapshot { $($field: self.$field.get(),)* }
            }
        }

        /// What a server has done so far. Counters rise; a gauge goes up and down.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Snapshot {
            $($(#[$doc])* pub $field: u64,)*
        }

        impl Snapshot {
            /// How many values there are.
            pub const COUNT: usize = [$($name),*].len();

            /// Every value with its stable name and whether it is a gauge.
            #[must_use]
            pub fn values(&self) -> [(&'static str, u64, bool); Self::COUNT] {
                [$(($name, self.$field, $crate::metrics!(@is_gauge $kind)),)*]
            }
        }

        #[cfg(test)]
        mod documentation {
            #[test]
            fn has_a_row_for_each_metric() {
                let page = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../", $page));
                let names = [$($name),*];
                let family = |name: &str| name.split('_').next().map(str::to_owned);
                let cells = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
                let rows = cells.filter(|cell| family(cell) == family(names[0]));
                assert_eq!(rows.collect::<Vec<_>>(), names);
            }
        }
    };
    (@is_gauge counter) => { false };
    (@is_gauge gauge) => { true };
}
