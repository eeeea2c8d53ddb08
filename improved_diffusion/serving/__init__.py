"""Many people, one device: a durable queue, the one worker that draws, a Telegram bot. See docs/serving.md."""
