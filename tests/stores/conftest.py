"""Makes pytest explain the assertions of the shipped suite as it does those of a test module."""

import pytest

pytest.register_assert_rewrite("sheratan_stores.conformance", "sheratan_stores.story")
