//! Credentials that were handed over for single repositories: the pull secrets of pods. They are in memory only.

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use super::config::Credential;
use crate::reference::Reference;

/// Most repositories with a secret; those that were not asked for longest are forgotten.
const MAX_REPOSITORIES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// A secret that was handed over for one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PullSecret(Credential);

impl PullSecret {
    /// A user's name and password.
    pub fn password(user: String, password: String) -> Self {
        PullSecret(Credential::Password { user, password })
    }

    /// An OAuth2 refresh token, which registries' token services take in place of a password.
    pub fn identity_token(token: String) -> Self {
        PullSecret(Credential::IdentityToken(token))
    }

    /// A token that the registry itself takes.
    pub fn registry_token(token: String) -> Self {
        PullSecret(Credential::RegistryToken(token))
    }
}

/// Secrets by repository: what is for one is never used for another.
pub struct Keychain {
    held: Mutex<LruCache<String, Held>>,
}

/// The secrets of a repository.
#[derive(Default)]
struct Held {
    /// That with which an image was pulled last.
    good: Option<Credential>,
    /// Those with which one is being pulled, the newest last.
    trials: Vec<(u64, Credential)>,
    next: u64,
}

impl Default for Keychain {
    fn default() -> Self {
        Keychain { held: Mutex::new(LruCache::new(MAX_REPOSITORIES)) }
    }
}

impl fmt::Debug for Keychain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keychain({} repositories)", self.held().len())
    }
}

impl Keychain {
    /// Uses a secret for the image's repository for as long as the trial lives, and from then on if that
    /// [`succeeded`](Trial::succeeded): a wrong one must not take those that run from images of the repository their
    /// bytes away.
    pub fn try_out(self: &Arc<Self>, image: &Reference, secret: PullSecret) -> Trial {
        let repository = image.name();
        let mut held = self.held();
        let entry = held.get_or_insert_mut(repository.clone(), Held::default);
        let number = entry.next;
        entry.next += 1;
        entry.trials.push((number, secret.0.clone()));
        drop(held);
        Trial { keychain: Arc::clone(self), repository, number, secret }
    }

    /// The secret for a repository.
    pub(crate) fn get(&self, registry: &str, repository: &str) -> Option<Credential> {
        let mut held = self.held();
        let entry = held.get(&format!("{registry}/{repository}"))?;
        entry.trials.last().map(|(_, secret)| secret).or(entry.good.as_ref()).cloned()
    }

    /// All that have proven to be right, for [`Keychain::restore`] of another process; as secret as they are.
    pub fn save(&self) -> Vec<u8> {
        let held = self.held();
        // Least used first, as they have to be put back.
        let all: Vec<(&String, &Credential)> =
            held.iter().rev().filter_map(|(name, entry)| Some((name, entry.good.as_ref()?))).collect();
        serde_json::to_vec(&all).unwrap_or_default()
    }

    /// Puts back what another process saved.
    ///
    /// # Errors
    /// When it makes no sense; the message quotes nothing of it.
    pub fn restore(&self, saved: &[u8]) -> Result<(), String> {
        let all: Vec<(String, Credential)> = serde_json::from_slice(saved)
            .map_err(|e| format!("it makes no sense at line {}, column {}", e.line(), e.column()))?;
        let mut held = self.held();
        for (name, secret) in all {
            held.put(name, Held { good: Some(secret), ..Held::default() });
        }
        Ok(())
    }

    fn held(&self) -> MutexGuard<'_, LruCache<String, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A secret that is being tried.
#[derive(Debug)]
pub struct Trial {
    keychain: Arc<Keychain>,
    repository: String,
    number: u64,
    secret: PullSecret,
}

impl Trial {
    /// The registry took it: it is the repository's from now on. Says whether it was not before.
    pub fn succeeded(self) -> bool {
        let mut held = self.keychain.held();
        let entry = held.get_or_insert_mut(self.repository.clone(), Held::default);
        entry.good.replace(self.secret.0.clone()).as_ref() != Some(&self.secret.0)
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        let mut held = self.keychain.held();
        let Some(entry) = held.peek_mut(&self.repository) else { return };
        entry.trials.retain(|(number, _)| *number != self.number);
        if entry.trials.is_empty() && entry.good.is_none() {
            held.pop(&self.repository);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(password: &str) -> PullSecret {
        PullSecret::password("ann".into(), password.into())
    }

    fn image(name: &str) -> Reference {
        name.parse().unwrap()
    }

    #[test]
    fn a_secret_is_for_its_repository_alone() {
        let keychain = Arc::new(Keychain::default());
        assert!(keychain.try_out(&image("r.example/team/app:1"), secret("app")).succeeded());
        assert!(keychain.try_out(&image("redis"), secret("hub")).succeeded());
        let get = |registry: &str, repository: &str| keychain.get(registry, repository).map(PullSecret);
        assert_eq!(get("r.example", "team/app"), Some(secret("app")));
        assert_eq!(get("docker.io", "library/redis"), Some(secret("hub")));
        for (registry, repository) in [
            ("r.example", "team"),
            ("r.example", "team/app/sub"),
            ("r.example", "team/apple"),
            ("s.example", "team/app"),
            ("docker.io", "redis"),
        ] {
            assert_eq!(get(registry, repository), None, "{registry}/{repository}");
        }
    }

    #[test]
    fn what_fails_leaves_what_worked() {
        let keychain = Arc::new(Keychain::default());
        let get = || keychain.get("r.example", "x").map(PullSecret);
        let first = keychain.try_out(&image("r.example/x:1"), secret("good"));
        assert_eq!(get(), Some(secret("good")), "as long as it is tried");
        let wrong = keychain.try_out(&image("r.example/x:2"), secret("wrong"));
        assert_eq!(get(), Some(secret("wrong")));
        assert!(first.succeeded());
        drop(wrong);
        assert_eq!(get(), Some(secret("good")));
        assert!(!keychain.try_out(&image("r.example/x:1"), secret("good")).succeeded(), "nothing new");
        assert!(keychain.try_out(&image("r.example/x:1"), secret("newer")).succeeded());
        assert_eq!(get(), Some(secret("newer")));
        drop(keychain.try_out(&image("r.example/y"), secret("wrong")));
        assert_eq!(keychain.get("r.example", "y"), None);
    }

    #[test]
    fn what_is_known_can_be_handed_over_and_shows_nothing() {
        let keychain = Arc::new(Keychain::default());
        keychain.try_out(&image("r.example/x"), secret("hunter2")).succeeded();
        keychain.try_out(&image("r.example/y"), PullSecret::registry_token("hunter3".into())).succeeded();
        let trial = keychain.try_out(&image("r.example/z"), PullSecret::identity_token("hunter4".into()));
        assert!(!format!("{keychain:?} {trial:?}").contains("hunter"));
        let next = Keychain::default();
        next.restore(&keychain.save()).unwrap();
        assert_eq!(next.get("r.example", "x").map(PullSecret), Some(secret("hunter2")));
        assert_eq!(next.get("r.example", "z"), None, "it was not proven");
        let why = next.restore(br#"[["r.example/x", "hunter2"]]"#).unwrap_err();
        assert!(!why.contains("hunter"), "{why}");
    }

    #[test]
    fn it_holds_so_many_and_no_more() {
        let keychain = Arc::new(Keychain::default());
        for i in 0..MAX_REPOSITORIES.get() + 10 {
            keychain.try_out(&image(&format!("r.example/{i}")), secret("x")).succeeded();
        }
        assert_eq!(keychain.held().len(), MAX_REPOSITORIES.get());
        assert_eq!(keychain.get("r.example", "0"), None);
    }
}
