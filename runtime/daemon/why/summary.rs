//! What a timeline comes to: where the time went.

use lazyrun_fetcher::Class;

use crate::ipc::why::{ClassBytes, Part, Start, Summary};

/// Times in which something was going on: ascending and apart.
#[derive(Debug, Clone, Default, PartialEq)]
struct Busy(Vec<(f64, f64)>);

impl Busy {
    fn of(times: impl Iterator<Item = (f64, f64)>) -> Busy {
        let mut times: Vec<(f64, f64)> = times.filter(|(start, end)| end > start).collect();
        times.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut busy: Vec<(f64, f64)> = Vec::new();
        for (start, end) in times {
            match busy.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => busy.push((start, end)),
            }
        }
        Busy(busy)
    }

    /// The times that are in both.
    fn and(&self, other: &Busy) -> Busy {
        let pairs = self.0.iter().flat_map(|a| other.0.iter().map(move |b| (a.0.max(b.0), a.1.min(b.1))));
        Busy::of(pairs)
    }

    fn sum(&self) -> f64 {
        self.0.iter().fold(0.0, |sum, (start, end)| sum + (end - start))
    }
}

/// Sums a timeline up.
pub fn summary(start: &Start) -> Summary {
    let total_ms = start.phases.last().map_or(0.0, |phase| phase.end_ms);
    let run = start.phases.iter().find(|phase| phase.name == "run");
    let started_ms = run.map_or(total_ms, |phase| phase.start_ms);
    let reads = Busy::of(start.reads.iter().map(|read| (read.start_ms, read.start_ms + read.ms)));
    let mut summary = Summary {
        total_ms,
        started_ms,
        requests: start.requests.len() as u64 + start.dropped.requests,
        retries: start.requests.iter().filter(|request| request.retries > 0).count() as u64,
        bytes: by_class(start),
        reads: start.reads.len() as u64 + start.dropped.reads,
        blocked_ms: reads.sum(),
        not_lazy: not_lazy(start),
        parts: Vec::new(),
    };
    for phase in &start.phases {
        let during = Busy(vec![(phase.start_ms, phase.end_ms)]);
        let mut part = |what: &str, ms: f64| {
            // What is no whole microsecond is a difference of rounded numbers.
            if ms >= 0.001 {
                summary.parts.push(Part { what: what.to_owned(), ms: round(ms) });
            }
        };
        let all = during.sum();
        match phase.name.as_str() {
            "run" => {
                let blocked = reads.and(&during);
                let fetching = requests(start, |class| class == Class::Fault).and(&blocked).sum();
                let foreseen = requests(start, |class| class != Class::Fault).and(&blocked);
                let fault = requests(start, |class| class == Class::Fault);
                // Only where no request of its own was under way did a read wait for another's.
                let other = foreseen.sum() - foreseen.and(&fault).sum();
                part("reads: network", fetching);
                part("reads: waiting for prefetch or hydration", other);
                part("reads: decoding and queues", blocked.sum() - fetching - other);
                part("the command itself", all - blocked.sum());
            }
            "resolve" | "index" => {
                let waiting = requests(start, |class| class == Class::Metadata).and(&during).sum();
                part(&format!("{}: network", title(&phase.name)), waiting);
                part(title(&phase.name), all - waiting);
            }
            "stream" => {
                let waiting = requests(start, |class| class == Class::Stream).and(&during).sum();
                part("streaming layers: network", waiting);
                part("streaming layers: decoding, digests, writing", all - waiting);
            }
            name => part(title(name), all),
        }
    }
    summary
}

fn title(phase: &str) -> &str {
    match phase {
        "resolve" => "manifest and config",
        "index" => "indexes and profile",
        "view" => "view",
        "network" => "network of the container",
        "bundle" => "bundle",
        "rootfs" => "root filesystem",
        "shim" => "container setup",
        other => other,
    }
}

fn requests(start: &Start, of: impl Fn(Class) -> bool) -> Busy {
    let of_class = start.requests.iter().filter(|request| of(request.class));
    Busy::of(of_class.map(|request| (request.start_ms, request.end_ms)))
}

fn by_class(start: &Start) -> Vec<ClassBytes> {
    let sums = Class::ALL.into_iter().map(|class| {
        let of_class = start.requests.iter().filter(|request| request.class == class);
        let (requests, bytes) = of_class.fold((0, 0), |(n, bytes), r| (n + 1, bytes + r.bytes));
        ClassBytes { class, requests, bytes }
    });
    sums.filter(|sum| sum.requests > 0).collect()
}

fn not_lazy(start: &Start) -> Vec<String> {
    let streamed = (0..).zip(&start.layers).filter(|(_, layer)| layer.index.starts_with("none"));
    let mut reasons: Vec<String> = streamed
        .map(|(number, layer)| {
            format!(
                "layer {number} ({}) had no index here or in the registry: all of it was streamed first",
                layer.layer
            )
        })
        .collect();
    if !start.layers.is_empty() && start.profile == "none" && !start.reads.is_empty() {
        reasons.push("there was no profile: bytes were fetched only when they were read".to_owned());
    }
    reasons
}

fn round(ms: f64) -> f64 {
    (ms * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::super::recording::Recording;
    use super::*;
    use crate::ipc::why::{Phase, ReadOf, RequestOf, Started};

    fn phase(name: &str, start_ms: f64, end_ms: f64) -> Phase {
        Phase { name: name.into(), start_ms, end_ms }
    }

    fn request(class: Class, start_ms: f64, end_ms: f64) -> RequestOf {
        RequestOf {
            host: "h".into(),
            kind: "layer".into(),
            what: "blobs/x".into(),
            layer: Some(0),
            range: None,
            spans: None,
            class,
            second: false,
            retries: 0,
            start_ms,
            sent_ms: None,
            first_byte_ms: None,
            end_ms,
            bytes: 100,
            status: Some(206),
            failure: None,
        }
    }

    fn read(start_ms: f64, ms: f64) -> ReadOf {
        ReadOf {
            layer: 0,
            offset: 0,
            len: 1,
            path: "p".into(),
            more_files: 0,
            start_ms,
            ms,
            ok: true,
            container: None,
        }
    }

    #[test]
    fn the_parts_are_the_whole() {
        let mut start = Recording::new("h/app:v1", Started::Mount).snapshot();
        start.phases = vec![
            phase("resolve", 0.0, 50.0),
            phase("stream", 50.0, 50.0),
            phase("view", 50.0, 60.0),
            phase("run", 60.0, 200.0),
        ];
        start.requests = vec![
            request(Class::Metadata, 1.0, 20.0),
            request(Class::Metadata, 10.0, 40.0),
            request(Class::Fault, 70.0, 90.0),
            request(Class::Hydrate, 80.0, 150.0),
        ];
        start.reads = vec![read(70.0, 25.0), read(85.0, 15.0), read(140.0, 5.0)];
        let sums = summary(&start);
        let parts: Vec<(&str, f64)> = sums.parts.iter().map(|p| (p.what.as_str(), p.ms)).collect();
        assert_eq!(
            parts,
            [
                ("manifest and config: network", 39.0),
                ("manifest and config", 11.0),
                ("view", 10.0),
                ("reads: network", 20.0),
                ("reads: waiting for prefetch or hydration", 15.0),
                ("the command itself", 105.0),
            ]
        );
        assert_eq!((sums.total_ms, sums.started_ms, sums.blocked_ms), (200.0, 60.0, 35.0));
        assert_eq!(sums.parts.iter().map(|p| p.ms).sum::<f64>(), sums.total_ms);
        assert_eq!((sums.requests, sums.reads, sums.bytes.len()), (4, 3, 3));
    }

    #[test]
    fn times_are_joined_and_met() {
        let busy = Busy::of([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (4.0, 4.0)].into_iter());
        assert_eq!(busy, Busy(vec![(0.0, 3.0), (5.0, 6.0)]));
        assert_eq!(busy.and(&Busy(vec![(2.0, 5.5)])), Busy(vec![(2.0, 3.0), (5.0, 5.5)]));
        assert_eq!(busy.sum(), 4.0);
    }
}
