"""From a photograph to a sticker: caption, restyle, cut out, finish."""
