"""What every floor may use of the machine: devices and processes."""
