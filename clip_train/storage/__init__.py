"""Files elsewhere: by URL, with retries."""
