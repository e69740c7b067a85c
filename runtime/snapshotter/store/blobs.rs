//! Of which images containerd is still to get all layers.

use redb::{ReadableDatabase, ReadableTable};

use super::{BLOBS, Result, Store};

impl Store {
    /// Notes whether containerd is to get the layers of an image, by containerd's namespace and the key of the image.
    ///
    /// # Errors
    /// The database's.
    pub fn want_blobs(&self, namespace: &str, image: &str, wanted: bool) -> Result<()> {
        let write = self.db.begin_write()?;
        let news = {
            let mut blobs = write.open_table(BLOBS)?;
            match wanted {
                true => blobs.insert((namespace, image), ())?.is_none(),
                false => blobs.remove((namespace, image))?.is_some(),
            }
        };
        if news {
            write.commit()?;
        } else {
            write.abort()?;
        }
        Ok(())
    }

    /// All images of which that is noted.
    ///
    /// # Errors
    /// The database's.
    pub fn wanted_blobs(&self) -> Result<Vec<(String, String)>> {
        let blobs = self.db.begin_read()?.open_table(BLOBS)?;
        let mut all = Vec::new();
        for row in blobs.iter()? {
            let (key, _) = row?;
            let (namespace, image) = key.value();
            all.push((namespace.to_owned(), image.to_owned()));
        }
        Ok(all)
    }
}
