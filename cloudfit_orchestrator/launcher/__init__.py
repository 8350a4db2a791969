"""The secure image launcher: builds, signs and verifies the images that machines boot."""
