// swift-tools-version: 5.9

import PackageDescription

let package = Package(
    name: "TinyQmoeClient",
    platforms: [.macOS(.v13), .iOS(.v16)],
    products: [.library(name: "TinyQmoeClient", targets: ["TinyQmoeClient"])],
    targets: [
        .target(name: "TinyQmoeClient"),
        .executableTarget(name: "chat", dependencies: ["TinyQmoeClient"]),
    ]
)
