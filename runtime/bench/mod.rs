//! Pull versus lazy start, measured on the user's own image.
