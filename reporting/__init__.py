"""results/ -> Markdown and pictures."""
