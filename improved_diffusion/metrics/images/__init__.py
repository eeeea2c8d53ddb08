"""Where images to measure come from."""
