//! What an instance has on disk: `system df`, `system prune`, `system check`, and its limits.

use std::io::{BufRead, Write};
use std::process::ExitCode;

use serde::Serialize;

use super::{Context, output};
use crate::failure::Failure;
use crate::ipc::client::Quiet;
use crate::ipc::protocol::Request;
use crate::ipc::system::{CheckReport, DiskUsage, LimitChange, PruneOptions, Pruned, SystemAction};

/// A line of `system df`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    /// What it is.
    #[serde(rename = "Type")]
    kind: &'static str,
    /// How many there are.
    total_count: usize,
    /// How many of them are in use.
    active: usize,
    /// Bytes of disk.
    size: u64,
    /// Those that could be freed without losing what can't be had again.
    reclaimable: u64,
    /// Of layer files: bytes that are local, and bytes in all.
    local: u64,
    full: u64,
}

/// Has the daemon keep to limits that were given with the command, now and later.
pub(super) fn limit(context: &Context, change: LimitChange) -> Result<(), Failure> {
    let action = SystemAction::Limit(change);
    crate::keeper::start::connect_or_start(&context.paths, &context.settings)?
        .call(&Request::System(action), &mut Quiet)
}

pub(super) fn usage(context: &Context, verbose: bool, format: Option<&str>) -> Result<(), Failure> {
    let usage: DiskUsage = match context.paths.meta().exists() {
        true => context.daemon()?.call(&Request::System(SystemAction::Usage), &mut Quiet)?,
        false => DiskUsage::default(),
    };
    if verbose {
        return match format.filter(|format| *format != "table") {
            Some(format) => output::value(&usage, Some(format)),
            None => details(&usage),
        };
    }
    output::rows(
        &rows(&usage),
        format,
        &[
            ("TYPE", |r| r.kind.to_owned()),
            ("TOTAL", |r| r.total_count.to_string()),
            ("ACTIVE", |r| r.active.to_string()),
            ("SIZE", |r| output::bytes(r.size)),
            ("RECLAIMABLE", |r| match (r.reclaimable * 100).checked_div(r.size) {
                Some(percent) => format!("{} ({percent}%)", output::bytes(r.reclaimable)),
                None => output::bytes(0),
            }),
            ("LOCAL / FULL", |r| match r.full {
                0 => String::new(),
                full => format!("{} / {}", output::bytes(r.local), output::bytes(full)),
            }),
        ],
    )?;
    if format.is_none_or(|format| format == "table") {
        output::print(&format!("\n{}", limits(&usage)))?;
    }
    Ok(())
}

fn rows(usage: &DiskUsage) -> Vec<Row> {
    let layers = &usage.layers;
    let sum = |sizes: &mut dyn Iterator<Item = u64>| sizes.sum::<u64>();
    let documents_of = |with_containers: bool| {
        let images = usage.images.iter().filter(|i| with_containers || i.containers == 0);
        images.map(|i| i.unique_size).sum::<u64>()
    };
    vec![
        Row {
            kind: "Images",
            total_count: usage.images.len(),
            active: usage.images.iter().filter(|i| i.containers > 0).count(),
            size: documents_of(true) + shared(usage),
            reclaimable: documents_of(false),
            ..Row::default()
        },
        Row {
            kind: "Layer cache",
            total_count: layers.len(),
            active: layers.iter().filter(|l| !l.in_use.is_empty()).count(),
            size: sum(&mut layers.iter().map(|l| l.size)),
            reclaimable: sum(&mut layers
                .iter()
                .filter(|l| l.in_use.is_empty() && l.refetchable)
                .map(|l| l.size)),
            local: sum(&mut layers.iter().map(|l| l.local)),
            full: sum(&mut layers.iter().map(|l| l.full)),
        },
        Row {
            kind: "Indexes",
            total_count: layers.len(),
            active: layers.iter().filter(|l| !l.in_use.is_empty()).count(),
            size: sum(&mut layers.iter().map(|l| l.index_size)),
            reclaimable: sum(&mut layers.iter().filter(|l| l.images == 0).map(|l| l.index_size)),
            ..Row::default()
        },
        Row {
            kind: "Views",
            total_count: usage.views.len(),
            active: usage.views.iter().filter(|v| v.in_use).count(),
            size: sum(&mut usage.views.iter().map(|v| v.size)),
            reclaimable: sum(&mut usage.views.iter().filter(|v| !v.in_use).map(|v| v.size)),
            ..Row::default()
        },
        Row {
            kind: "Containers",
            total_count: usage.containers.len(),
            active: usage.containers.iter().filter(|c| c.running).count(),
            size: sum(&mut usage.containers.iter().map(|c| c.size)),
            reclaimable: sum(&mut usage.containers.iter().filter(|c| !c.running).map(|c| c.size)),
            ..Row::default()
        },
        Row {
            kind: "Profiles",
            total_count: usage.profiles.count,
            size: usage.profiles.size,
            ..Row::default()
        },
        Row {
            kind: "Leftovers",
            total_count: usage.leftovers.count,
            size: usage.leftovers.size,
            reclaimable: usage.leftovers.size,
            ..Row::default()
        },
    ]
}

// Layer files that several images have, each once.
fn shared(usage: &DiskUsage) -> u64 {
    usage.layers.iter().filter(|l| l.images > 1).map(|l| l.size + l.index_size).sum()
}

fn limits(usage: &DiskUsage) -> String {
    let cache = &usage.cache;
    let limit = match cache.limit_bytes {
        0 => "without a limit".to_owned(),
        bytes if cache.limit.ends_with('%') => {
            format!("of at most {} ({} of the disk)", output::bytes(bytes), cache.limit)
        }
        bytes => format!("of at most {}", output::bytes(bytes)),
    };
    format!(
        "The cache takes {} {limit}. The disk has {} free of {}, of which {} are kept.\n",
        output::bytes(cache.used),
        output::bytes(cache.disk_free),
        output::bytes(cache.disk_size),
        output::bytes(cache.reserve),
    )
}

fn details(usage: &DiskUsage) -> Result<(), Failure> {
    let size = output::bytes;
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let percent = |local: u64, full: u64| format!("{}%", (local * 100).checked_div(full).unwrap_or(0));
    let mut text = String::new();
    let mut table = |title: &str, header: &[&str], rows: Vec<Vec<String>>| {
        let mut lines = vec![header.iter().map(|name| (*name).to_owned()).collect()];
        lines.extend(rows);
        text += &format!("{title}\n\n{}\n", output::table(&lines));
    };
    let short = |id: &str| id.trim_start_matches("sha256:").chars().take(12).collect::<String>();
    table(
        "Images",
        &["IMAGE", "IMAGE ID", "SHARED SIZE", "UNIQUE SIZE", "FULL", "LOCAL", "CONTAINERS"],
        usage
            .images
            .iter()
            .map(|i| {
                let (shared, unique) = (size(i.shared_size), size(i.unique_size));
                let local = percent(i.local, i.full);
                let reference = i.reference.clone();
                vec![reference, short(&i.id), shared, unique, size(i.full), local, i.containers.to_string()]
            })
            .collect(),
    );
    table(
        "Layer files",
        &["LAYER", "SIZE", "INDEX", "FULL", "LOCAL", "IMAGES", "IN USE", "REFETCHABLE"],
        usage
            .layers
            .iter()
            .map(|l| {
                let (local, images) = (percent(l.local, l.full), l.images.to_string());
                let in_use = if l.in_use.is_empty() { "no".to_owned() } else { l.in_use.clone() };
                let sizes = [size(l.size), size(l.index_size), size(l.full)];
                let mut row = vec![short(&l.id)];
                row.extend(sizes);
                row.extend([local, images, in_use, yes(l.refetchable)]);
                row
            })
            .collect(),
    );
    table(
        "Views",
        &["VIEW", "SIZE", "IN USE"],
        usage.views.iter().map(|v| vec![v.name.clone(), size(v.size), yes(v.in_use)]).collect(),
    );
    table(
        "Containers",
        &["CONTAINER ID", "NAMES", "IMAGE", "SIZE", "RUNNING"],
        usage
            .containers
            .iter()
            .map(|c| vec![short(&c.id), c.names.clone(), c.image.clone(), size(c.size), yes(c.running)])
            .collect(),
    );
    output::print(&(text + &limits(usage)))
}

pub(super) fn prune(
    context: &Context,
    options: PruneOptions,
    force: bool,
    format: Option<&str>,
) -> Result<ExitCode, Failure> {
    if !force && !options.dry_run && !confirmed(options)? {
        return Ok(ExitCode::SUCCESS);
    }
    let pruned: Pruned = match context.paths.meta().exists() {
        true => context.daemon()?.call(&Request::System(SystemAction::Prune(options)), &mut Quiet)?,
        false => Pruned { dry_run: options.dry_run, ..Pruned::default() },
    };
    if let Some(format) = format {
        output::value(&pruned, Some(format))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    let verb = if pruned.dry_run { "To be deleted" } else { "Deleted" };
    let lists = [
        ("containers", &pruned.containers),
        ("images", &pruned.images),
        ("views", &pruned.views),
        ("leftovers", &pruned.leftovers),
    ];
    for (what, list) in lists.into_iter().filter(|(_, list)| !list.is_empty()) {
        text += &format!("{verb} {what}:\n{}\n\n", list.join("\n"));
    }
    if pruned.evicted > 0 {
        let verb = if pruned.dry_run { "To be evicted" } else { "Evicted" };
        text += &format!("{verb} from the layer cache: {}\n\n", output::bytes(pruned.evicted));
    }
    let verb = if pruned.dry_run { "Space to be reclaimed" } else { "Total reclaimed space" };
    output::print(&format!("{text}{verb}: {}\n", output::bytes(pruned.space_reclaimed)))?;
    Ok(ExitCode::SUCCESS)
}

fn confirmed(options: PruneOptions) -> Result<bool, Failure> {
    let mut what = vec!["containers that have ended", "views that no container uses", "leftovers"];
    if options.all {
        what.push("images without a container");
    }
    if options.cache {
        what.push("local bytes of layers that can be fetched again and that nothing in use reads");
    }
    let io = |e: std::io::Error| Failure::daemon(format!("the answer can't be read: {e}"));
    let mut err = std::io::stderr().lock();
    write!(err, "This removes {}. Continue? [y/N] ", what.join(", ")).map_err(io)?;
    err.flush().map_err(io)?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(io)?;
    if answer.is_empty() {
        // Nobody is there to answer.
        return Err(Failure::new(1, "nothing was removed; to remove without being asked use --force"));
    }
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

pub(super) fn check(context: &Context, repair: bool, format: Option<&str>) -> Result<ExitCode, Failure> {
    let report: CheckReport = match context.paths.meta().exists() {
        true => context.daemon()?.call(&Request::System(SystemAction::Check { repair }), &mut Quiet)?,
        false => CheckReport::default(),
    };
    match format {
        Some(format) => output::value(&report, Some(format))?,
        None => {
            let mut text = String::new();
            for bad in &report.bad {
                let what = if repair { "was wrong and is dropped" } else { "is wrong" };
                let end = bad.offset + bad.length;
                text +=
                    &format!("layer {}: span {} (bytes {}..{end}) {what}\n", bad.layer, bad.span, bad.offset);
            }
            let good = report.spans - report.bad.len();
            text += &format!(
                "{} layers, {} spans, {}: {good} good, {} wrong\n",
                report.layers,
                report.spans,
                output::bytes(report.bytes),
                report.bad.len()
            );
            output::print(&text)?;
        }
    }
    if report.bad.is_empty() || repair {
        return Ok(ExitCode::SUCCESS);
    }
    Err(Failure::new(
        1,
        format!(
            "{} local spans are wrong; `lazyrun system check --repair` drops them, to be fetched again",
            report.bad.len()
        ),
    ))
}
