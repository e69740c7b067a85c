//! Single flight: many ask, one task works, all get its answer.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use lazyrun_index::LayerId;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::error::FetchError;

type Answer<T> = Option<Result<T, FetchError>>;

/// Work in progress, by layer.
pub(super) struct Flights<T> {
    active: Mutex<HashMap<LayerId, Weak<Flight<T>>>>,
}

impl<T> Default for Flights<T> {
    fn default() -> Self {
        Flights { active: Mutex::default() }
    }
}

/// One piece of work. It is aborted when the last handle is dropped.
pub(super) struct Flight<T> {
    answer: watch::Receiver<Answer<T>>,
    task: AbortHandle,
    /// Goes on when nobody waits any more.
    detached: AtomicBool,
}

impl<T> Drop for Flight<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    /// Joins the work under `key`, or starts it.
    pub(super) fn join<F>(&self, key: LayerId, work: impl FnOnce() -> F) -> Arc<Flight<T>>
    where
        F: Future<Output = Result<T, FetchError>> + Send + 'static,
    {
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = active.get(&key).and_then(Weak::upgrade)
            && flight.answer.borrow().is_none()
            && flight.answer.has_changed().is_ok()
        {
            return flight;
        }
        let (sender, answer) = watch::channel(None);
        let work = work();
        let task = tokio::spawn(async move {
            let result = work.await;
            sender.send_replace(Some(result));
        });
        let flight = Arc::new(Flight { answer, task: task.abort_handle(), detached: AtomicBool::new(false) });
        active.retain(|_, weak| weak.strong_count() > 0);
        active.insert(key, Arc::downgrade(&flight));
        flight
    }

    /// Whether work under `key` is going on.
    pub(super) fn is_active(&self, key: &LayerId) -> bool {
        let active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        let flight = active.get(key).and_then(Weak::upgrade);
        flight.is_some_and(|flight| flight.answer.borrow().is_none() && flight.answer.has_changed().is_ok())
    }

    /// Joins or starts work that goes on when nobody waits any more. `then` runs when it is done and the next one to
    /// join would start anew.
    pub(super) fn join_detached<F>(
        &self,
        key: LayerId,
        work: impl FnOnce() -> F,
        then: impl FnOnce() + Send + 'static,
    ) where
        F: Future<Output = Result<T, FetchError>> + Send + 'static,
    {
        let flight = self.join(key, work);
        // One task keeps it alive, however many ask.
        if !flight.detached.swap(true, Relaxed) {
            tokio::spawn(async move {
                let _ = flight.wait("a stream").await;
                then();
            });
        }
    }

    /// Stops the work under `key`, if there is any; who waits for it gets [`FetchError::Interrupted`].
    pub(super) fn cancel(&self, key: &LayerId) -> bool {
        let flight = {
            let active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
            active.get(key).and_then(Weak::upgrade)
        };
        flight.is_some_and(|flight| {
            let active = !flight.task.is_finished();
            flight.task.abort();
            active
        })
    }
}

impl<T: Clone> Flight<T> {
    pub(super) async fn wait(&self, what: &'static str) -> Result<T, FetchError> {
        let mut answer = self.answer.clone();
        match answer.wait_for(Option::is_some).await {
            Ok(done) => done.clone().unwrap_or(Err(FetchError::Interrupted { what })),
            // The task died without an answer.
            Err(_) => Err(FetchError::Interrupted { what }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lazyrun_index::Digest;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::oneshot;

    fn key() -> LayerId {
        LayerId::tar(Digest::of(b"a"))
    }

    #[tokio::test]
    async fn many_ask_one_works() {
        let flights = Flights::<u32>::default();
        let runs = Arc::new(AtomicUsize::new(0));
        let (go, gate) = oneshot::channel::<()>();
        let counted = Arc::clone(&runs);
        let first = flights.join(key(), || async move {
            counted.fetch_add(1, Ordering::SeqCst);
            let _ = gate.await;
            Ok(7)
        });
        let second = flights.join(key(), || async { Ok(8) });
        go.send(()).unwrap();
        assert_eq!(first.wait("x").await.unwrap(), 7);
        assert_eq!(second.wait("x").await.unwrap(), 7);
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        // Finished work is not joined again.
        assert_eq!(flights.join(key(), || async { Ok(9) }).wait("x").await.unwrap(), 9);
    }

    #[tokio::test]
    async fn the_last_to_leave_stops_the_work() {
        struct OnDrop(Option<oneshot::Sender<()>>);
        impl Drop for OnDrop {
            fn drop(&mut self) {
                let _ = self.0.take().map(|s| s.send(()));
            }
        }
        let flights = Flights::<u32>::default();
        let (dropped, was_dropped) = oneshot::channel();
        let guard = OnDrop(Some(dropped));
        let flight = flights.join(key(), || async move {
            let _guard = guard;
            std::future::pending::<()>().await;
            Ok(1)
        });
        drop(flight);
        was_dropped.await.unwrap();
    }

    #[tokio::test]
    async fn detached_work_goes_on_until_it_is_cancelled() {
        let flights = Flights::<u32>::default();
        for _ in 0..3 {
            flights.join_detached(key(), std::future::pending, || ());
        }
        tokio::task::yield_now().await;
        assert!(flights.is_active(&key()));
        let flight = flights.join(key(), || async { Ok(1) });
        flights.cancel(&key());
        assert!(matches!(flight.wait("x").await, Err(FetchError::Interrupted { what: "x" })));
        assert!(!flights.is_active(&key()));
    }

    #[tokio::test]
    async fn a_panic_is_an_error() {
        let flights = Flights::<u32>::default();
        let flight = flights.join(key(), || async { panic!("on purpose") });
        assert!(matches!(flight.wait("x").await, Err(FetchError::Interrupted { what: "x" })));
    }
}
