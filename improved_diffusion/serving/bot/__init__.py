"""The Telegram bot: a client of the queue like any other, which draws nothing itself."""
