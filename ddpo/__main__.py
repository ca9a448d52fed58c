from ddpo.cli import main

main()
