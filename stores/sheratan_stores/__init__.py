"""The stores that ship with Sheratan Hub, and the suite that proves any other (`conformance`)."""
