"""Building the profile of a device: what is timed, how, and whether a profile still holds."""
