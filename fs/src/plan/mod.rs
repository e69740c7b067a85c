//! Which mount plan this machine allows, found out by mounting for real.
//!
//! Versions and configuration files lie: a kernel may lack a module, a root directory may lie on an
//! overlay itself, a container may forbid mounts. So every piece of a plan is tried once where it will be used.

mod probe;
mod tiny;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use probe::probe;

/// How a view becomes a container's root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Plan {
    /// A kernel EROFS view over layer files, kernel overlayfs on top.
    Erofs,
    /// One FUSE mount of the whole view, kernel overlayfs on top.
    Overlay,
    /// The whole union in userspace.
    Fuse,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Erofs => "erofs",
            Self::Overlay => "overlay",
            Self::Fuse => "fuse",
        })
    }
}

impl FromStr for Plan {
    type Err = PlanError;

    fn from_str(name: &str) -> Result<Self, PlanError> {
        match name {
            "erofs" => Ok(Self::Erofs),
            "overlay" => Ok(Self::Overlay),
            "fuse" => Ok(Self::Fuse),
            _ => Err(PlanError::Unknown(name.to_owned())),
        }
    }
}

/// One thing tried: it works, or a sentence says why not.
pub type Check = Result<(), String>;

/// What was tried and how it went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probes {
    /// The right to mount (CAP_SYS_ADMIN).
    pub privilege: Check,
    /// `/dev/fuse` can be opened and a FUSE filesystem mounted and read.
    pub fuse: Check,
    /// EROFS mounts an image from a plain file in the root directory.
    pub erofs: Check,
    /// EROFS reads file contents from a layer file on FUSE.
    pub erofs_on_fuse: Check,
    /// overlayfs on such a view, with its upper in the root directory.
    pub overlay_on_erofs: Check,
    /// overlayfs on a FUSE mount, with its upper in the root directory.
    pub overlay_on_fuse: Check,
}

impl Probes {
    /// Every probe with a name for people.
    pub fn each(&self) -> [(&'static str, &Check); 6] {
        [
            ("right to mount", &self.privilege),
            ("FUSE", &self.fuse),
            ("EROFS from a file", &self.erofs),
            ("EROFS with contents on FUSE", &self.erofs_on_fuse),
            ("overlayfs on EROFS", &self.overlay_on_erofs),
            ("overlayfs on FUSE", &self.overlay_on_fuse),
        ]
    }

    /// Whether `plan` works here; the error is the first reason why not.
    pub fn allows(&self, plan: Plan) -> Check {
        let needed: &[&Check] = match plan {
            Plan::Erofs => {
                &[&self.privilege, &self.fuse, &self.erofs, &self.erofs_on_fuse, &self.overlay_on_erofs]
            }
            Plan::Overlay => &[&self.privilege, &self.fuse, &self.overlay_on_fuse],
            Plan::Fuse => &[&self.privilege, &self.fuse],
        };
        needed.iter().try_for_each(|check| (*check).clone())
    }
}

/// Why no plan, or not the wanted one, can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No such plan.
    #[error("unknown mount plan {0:?}: use erofs, overlay or fuse")]
    Unknown(String),
    /// The plan that was forced does not work here.
    #[error("mount plan {plan} cannot be used: {reason}")]
    Unavailable {
        /// The plan asked for.
        plan: Plan,
        /// Why not.
        reason: String,
    },
    /// None works.
    #[error("no mount plan works here: erofs: {erofs}; overlay: {overlay}; fuse: {fuse}")]
    None {
        /// Why not `erofs`.
        erofs: String,
        /// Why not `overlay`.
        overlay: String,
        /// Why not `fuse`.
        fuse: String,
    },
}

/// The forced plan if it works here, or the best one that does.
pub fn choose(probes: &Probes, forced: Option<Plan>) -> Result<Plan, PlanError> {
    if let Some(plan) = forced {
        let unavailable = |reason| PlanError::Unavailable { plan, reason };
        return probes.allows(plan).map(|()| plan).map_err(unavailable);
    }
    let Err(erofs) = probes.allows(Plan::Erofs) else { return Ok(Plan::Erofs) };
    let Err(overlay) = probes.allows(Plan::Overlay) else { return Ok(Plan::Overlay) };
    let Err(fuse) = probes.allows(Plan::Fuse) else { return Ok(Plan::Fuse) };
    Err(PlanError::None { erofs, overlay, fuse })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_good() -> Probes {
        Probes {
            privilege: Ok(()),
            fuse: Ok(()),
            erofs: Ok(()),
            erofs_on_fuse: Ok(()),
            overlay_on_erofs: Ok(()),
            overlay_on_fuse: Ok(()),
        }
    }

    #[test]
    fn the_best_working_plan_is_chosen() {
        let mut probes = all_good();
        assert_eq!(choose(&probes, None), Ok(Plan::Erofs));
        probes.erofs = Err("the kernel has no EROFS".into());
        assert_eq!(choose(&probes, None), Ok(Plan::Overlay));
        probes.overlay_on_fuse = Err("overlayfs refuses the upper".into());
        assert_eq!(choose(&probes, None), Ok(Plan::Fuse));
        probes.fuse = Err("there is no /dev/fuse".into());
        let error = choose(&probes, None).unwrap_err().to_string();
        assert!(
            error.contains("erofs: there is no /dev/fuse") && error.contains("fuse: there is no"),
            "{error}"
        );
    }

    #[test]
    fn a_forced_plan_is_used_or_refused_with_the_reason() {
        let mut probes = all_good();
        assert_eq!(choose(&probes, Some(Plan::Overlay)), Ok(Plan::Overlay));
        probes.erofs_on_fuse = Err("the device is refused".into());
        let error = choose(&probes, Some(Plan::Erofs)).unwrap_err().to_string();
        assert_eq!(error, "mount plan erofs cannot be used: the device is refused");
        probes.overlay_on_fuse = Err("overlayfs refuses the upper".into());
        assert_eq!(choose(&probes, Some(Plan::Fuse)), Ok(Plan::Fuse));
    }

    #[test]
    fn plans_have_names() {
        for plan in [Plan::Erofs, Plan::Overlay, Plan::Fuse] {
            assert_eq!(plan.to_string().parse(), Ok(plan));
        }
        assert!("aufs".parse::<Plan>().is_err());
    }
}
