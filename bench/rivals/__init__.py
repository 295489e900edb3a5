"""Who is measured: other people's ways, and every way of ours."""
