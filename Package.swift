// swift-tools-version: 6.2
// SPDX-License-Identifier: Apache-2.0
import PackageDescription

let strict: [SwiftSetting] = [
    .swiftLanguageMode(.v6),
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("InternalImportsByDefault"),
    .enableUpcomingFeature("MemberImportVisibility"),
    .treatAllWarnings(as: .error),
]

// Dependencies point one way, and the list reads as the data flows:
// Wire, TorchFile, TensorBoard, YAML <- Posix <- RunFiles <- Writer <- Daemon <- noether-writerd.
let package = Package(
    name: "noether-writer",
    products: [
        .library(name: "NoetherWriterClient", targets: ["NoetherWriterClient"]),
        .executable(name: "noether-writer", targets: ["noether-writer"]),
        .executable(name: "noether-writerd", targets: ["noether-writerd"]),
    ],
    traits: [
        .default(enabledTraits: ["CommandLine"]),
        // A trainer needs the library only: without this trait its package resolves nothing for the two programs.
        .trait(name: "CommandLine", description: "The daemon and the command line tool."),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
        .package(url: "https://github.com/apple/swift-log", from: "1.6.0"),
    ],
    targets: [
        .target(name: "CCopy"),
        .target(name: "CLinux"),
        .target(name: "CSystemd"),
        .systemLibrary(name: "CDeflate", providers: [.apt(["libdeflate-dev"])]),
        .systemLibrary(name: "CYaml", providers: [.apt(["libyaml-dev"])]),
        .target(name: "Wire", swiftSettings: strict),
        .target(name: "TorchFile", dependencies: ["CDeflate"], swiftSettings: strict),
        .target(name: "Posix", dependencies: ["CLinux"], swiftSettings: strict),
        .target(name: "TensorBoard", swiftSettings: strict),
        .target(name: "YAML", dependencies: ["CYaml"], swiftSettings: strict),
        .target(
            name: "Writer", dependencies: ["Posix", "RunFiles", "TensorBoard", "TorchFile", "Wire", "YAML"],
            swiftSettings: strict),
        .target(
            name: "Daemon",
            dependencies: ["CSystemd", "Posix", "Wire", "Writer", "YAML"],
            swiftSettings: strict),
        .target(
            name: "NoetherWriterClient",
            dependencies: [
                "CCopy", "Posix", "RunFiles", "TorchFile", "Wire", .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: strict),
        .target(name: "RunFiles", dependencies: ["Posix", "TorchFile", "Wire"], swiftSettings: strict),
        .target(name: "Chart", dependencies: ["CDeflate"], swiftSettings: strict),
        .executableTarget(
            name: "noether-writer",
            dependencies: [
                "Chart", "NoetherWriterClient", "Posix", "RunFiles", "TorchFile", "Wire", "Writer", "YAML",
                .product(
                    name: "ArgumentParser", package: "swift-argument-parser",
                    condition: .when(traits: ["CommandLine"])),
            ],
            // The page of `report`: in the program, which stays one file.
            resources: [.embedInCode("Page/page.css"), .embedInCode("Page/page.js")],
            swiftSettings: strict),
        .executableTarget(
            name: "noether-writerd",
            dependencies: [
                "Daemon", "Wire",
                .product(
                    name: "ArgumentParser", package: "swift-argument-parser",
                    condition: .when(traits: ["CommandLine"])),
            ],
            swiftSettings: strict),
        // A trainer of the end-to-end tests; not a product.
        .executableTarget(
            name: "SwiftTrainer",
            dependencies: ["NoetherWriterClient", .product(name: "Logging", package: "swift-log")],
            path: "Tests/SwiftTrainer",
            swiftSettings: strict),
        // A disk, a clock and an order of events that a seed decides, for the simulator and unit tests; not a product.
        .target(
            name: "SimulatedMachine", dependencies: ["CLinux", "Posix", "Writer"], path: "Tests/SimulatedMachine",
            swiftSettings: strict),
        // The daemon's runs on that machine; not a product.
        .executableTarget(
            name: "noether-writer-simulate",
            dependencies: ["CLinux", "Daemon", "Posix", "RunFiles", "SimulatedMachine", "TorchFile", "Wire", "Writer"],
            path: "Tests/Simulator", exclude: ["finds.py"], swiftSettings: strict),
        .testTarget(name: "PosixTests", dependencies: ["Posix"], swiftSettings: strict),
        .testTarget(name: "WireTests", dependencies: ["Wire"], swiftSettings: strict),
        .testTarget(name: "ChartTests", dependencies: ["Chart"], swiftSettings: strict),
        .testTarget(name: "RunFilesTests", dependencies: ["RunFiles"], swiftSettings: strict),
        .testTarget(name: "TorchFileTests", dependencies: ["TorchFile"], swiftSettings: strict),
        .testTarget(
            name: "NoetherWriterClientTests", dependencies: ["NoetherWriterClient", "Posix"], swiftSettings: strict),
        .testTarget(name: "TensorBoardTests", dependencies: ["TensorBoard"], swiftSettings: strict),
        .testTarget(
            name: "WriterTests", dependencies: ["Posix", "SimulatedMachine", "Wire", "Writer"], swiftSettings: strict),
        .testTarget(name: "DaemonTests", dependencies: ["Daemon", "Wire"], swiftSettings: strict),
    ]
)
